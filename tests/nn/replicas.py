"""Replicas of modules as DataParallel makes them, which runs only on accelerators."""


def replicate(module):
    """Return a replica of a module, as DataParallel makes it, on one device."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        object.__setattr__(replica, name, parameter)
    replica._modules = {name: replicate(each) for name, each in module._modules.items()}
    return replica
