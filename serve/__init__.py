"""The Ray Serve application: HTTP schema and deployment."""
