"""Environment variables that libraries read when they are imported. Imported before torch."""

import os

# torch's CPU threads wait for each other asleep, not spinning. While other programs take the cores,
# spinning makes two threads ten times slower (results/experiments.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
