"""The page and the API of FramePack's demo: they drop files into the inbox and look at what becomes of them.

Needs the extra ``web``. No model is loaded here; written are ``inbox/web``, and uploads in the state folder.
"""
