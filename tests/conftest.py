"""What every test here needs: one thread, and no GPU where a test does not ask for one."""

import torch

# The shapes of tests are too small for a second thread to help, and test processes share the cores.
torch.set_num_threads(1)
