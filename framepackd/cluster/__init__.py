"""Cards of other machines: to the supervisor each looks like a worker process of this one."""
