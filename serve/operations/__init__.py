"""How the service is started, watched, replaced and ended."""
