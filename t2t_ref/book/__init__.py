"""What the pages of the book are drawn with. Nothing else in the package imports it."""
