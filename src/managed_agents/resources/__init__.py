"""One folder per API noun: routes, schemas, service, tables."""
