"""Files of scans and masks, a module for each format; `samssl.data.scans` is what to call."""
