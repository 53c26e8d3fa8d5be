"""The application: routers, health, errors."""
