/* the arrows that fold parts of the menu have no name of their own in the theme */
document.addEventListener('DOMContentLoaded', () => {
  for (const arrow of document.querySelectorAll('.bd-sidebar-primary li > details > summary')) {
    const link = arrow.closest('li').querySelector('a');
    arrow.setAttribute('aria-label', `pages of “${link.textContent.trim()}”`);
  }
});
