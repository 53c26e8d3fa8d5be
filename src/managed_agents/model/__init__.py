"""The harness's side of the Messages API: client, events, errors, model limits, list prices, effective endpoint.

Nothing is imported here: the client brings the SDK's thousands of modules, and the api needs only the prices.
"""
