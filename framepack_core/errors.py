"""The errors that a caller may have to tell apart."""


class FramePackError(Exception):
    """Something is wrong that the person who asked can put right; the text says what and how."""


class RequestError(FramePackError):
    """The request cannot be carried out as it is: a setting, a picture, a combination of both."""


class ModelError(FramePackError):
    """The model's files are missing, incomplete or not what they should be."""


class DeviceError(ModelError):
    """The device that is to compute is not there, or is none that this torch can use."""


class FreshProcessError(Exception):
    """What computes is to go on in another process; the text says why. Nothing is wrong with the request."""


class CompileError(Exception):
    """The blocks cannot be compiled; the text says why. They can compute as they are."""
