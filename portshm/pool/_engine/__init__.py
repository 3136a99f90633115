"""The parent's side: who has a worker, what it is sent, what comes back, what a death means."""
