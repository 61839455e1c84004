# SPDX-License-Identifier: BSD-3-Clause
"""The specification of every op in plain PyTorch. Slow, obvious, and independent of the rest of
pywino."""
