"""What *measures*: exactness, speed, accuracy, replay, fidelity, sweeps, and back ends against each other."""
