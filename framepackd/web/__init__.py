"""The page with its buttons, and the API of FramePack's demo.

Both drop files into the inbox and follow the jobs. Needs the extra ``web``. Loads no model;
writes only to ``inbox/web``, and uploads to the state folder.
"""
