"""What a model needs, on paper: bytes of weights, caches, prompts and training, and plans for several devices.

- `sizes`: precisions, workloads, and the numbers of a configuration that bytes depend on.
- `memory`: weights, caches and the peak of a prompt. `training`: gradients and optimiser.
- `devices`: tensor-parallel and pipeline plans.

`config` is always an `IdeficsConfig` or plain `IdeficsFields`. The formulae describe this library, not IDEFICS in
general: image keys and values are made once, and images that nobody may see are not encoded. `docs/planning.md` applies
them. Nothing here imports a framework. Axes: see `idefics_common`.
"""
