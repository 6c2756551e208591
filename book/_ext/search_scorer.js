/* The order of search results (html_search_scorer). Sphinx gives many pages the same score and then sorts by title, so
   chapter 16 comes before chapter 3. Here what is named like the query comes first, then pages and sections that have it
   in their name. Of the API only what is named like the query; the rest comes last. The numbers below are Sphinx's own. */
const NAMED = 20, IN_THE_NAME = 10, API = -20;
var Scorer = {
  score: ([docname, title, anchor, descr, score, filename]) => {
    const plain = text => text.split(' > ').pop().replace(/^[\d.]+ /, '').trim().toLowerCase();
    const query = plain(new URLSearchParams(location.search).get('q') || ''), api = docname.startsWith('book/api/');
    const name = api ? plain(title).split('.').pop() : plain(title);
    return score + (name === query ? NAMED : api ? API : name.includes(query) ? IN_THE_NAME : 0);
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
