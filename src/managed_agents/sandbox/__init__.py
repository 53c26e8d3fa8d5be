"""The hands: where model-written code runs. `backend` is the seam, `docker` and `local` implement it."""
