"""The only place that imports Ray or MLflow."""

import os

# Ray's default from 2.61 on, which its clients and servers read differently where nothing is said. It is read
# when ray is imported, which comes after this.
os.environ.setdefault("RAY_AUTH_MODE", "token")
