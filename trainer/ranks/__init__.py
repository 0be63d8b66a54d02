"""Several processes that train one model together; see README.md."""
