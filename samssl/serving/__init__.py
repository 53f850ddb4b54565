"""A bundle behind HTTP: the application, without Ray, and its page in the browser."""
