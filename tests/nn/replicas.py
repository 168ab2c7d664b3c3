"""Replicas of modules, which DataParallel makes on accelerators alone."""


def replicate(module):
    """What DataParallel makes of a module, on one device."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        object.__setattr__(replica, name, parameter)
    replica._modules = {name: replicate(each) for name, each in module._modules.items()}
    return replica
