"""How public data sets lay out their files, a module for each; `samssl.data.sources` is what to call."""
