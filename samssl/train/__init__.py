"""The training loop and the two tasks it runs; knows neither Ray nor MLflow."""
