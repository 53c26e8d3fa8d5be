"""The tools a model is offered, and how their calls are run."""
