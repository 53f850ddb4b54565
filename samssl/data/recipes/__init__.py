"""Recipes that lay data sets out as `prepare` reads them."""
