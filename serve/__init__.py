"""The Ray Serve applications: the HTTP endpoint and the models that it calls."""
