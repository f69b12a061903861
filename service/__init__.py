"""The server: one use case (`denoiser`), an engine behind it, transports in front of it.

    rest -> schema -> denoiser -> text -> engine -> denoiser -> rest

One direction, no calls back up. Transports only translate; nothing outside imports this package.
"""
