"""The server: one use case (`denoiser`), an engine behind it, transports in front of it.

    rest | rpc -> schema -> denoiser -> text -> engine -> denoiser -> rest | rpc

Calls go in this direction only. Transports only translate; nothing outside imports this package.
"""
