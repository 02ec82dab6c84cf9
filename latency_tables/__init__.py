"""Latency tables measured on named environments, one JSON Lines file each; hwprune.latency reads them."""
