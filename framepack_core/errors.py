"""Defines the errors that a caller tells apart."""


class FramePackError(Exception):
    """A fault that the user can correct; the text says what is wrong and how to correct it."""


class RequestError(FramePackError):
    """The request cannot be carried out: a setting, an input file, or their combination is wrong."""


class ModelError(FramePackError):
    """The model's files are missing, incomplete or of another model."""


class DeviceError(ModelError):
    """The device is not there, or this torch cannot use it."""


class FreshProcessError(Exception):
    """The computation has to continue in a new process; the text says why. The request is in order."""


class CompileError(Exception):
    """The blocks cannot be compiled; the text says why. They still compute uncompiled."""
