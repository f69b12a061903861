"""API workers: processes that speak HTTP and gRPC, apart from the one that computes.

                      supervisor            the process that was started: signals, ports, births; never a request
             pipe ┌────────┴──┬───────┐
               engine      worker   worker    each ends when its pipe from the supervisor does
    private Unix │ socket ─────┴───────┘
      (0700)     │
    Host, one or more BatchingEngines         the same port for every worker (SO_REUSEPORT): FrontEnd,
                                              Denoiser, tokenizer, RemoteEngine; no model

    worker -> engine    Hello           I am here; what the counters of an engine before this one came to
                        Submit          a job, and the digest of the model its tokens were made for
                        Cancel          its caller left
                        Adopted         no more jobs for the model before this one
                        Reload, Scrape  asked of any worker, answered by the engine for the whole server
                        Report          the worker's own counters
                        Leave           this connection ends because I was asked to end
    engine -> worker    Serving         all a worker needs to serve a model: tokenizer, configuration, card, limits
                        Status          does it take work, how full is the queue
                        Base            counters that would go with the engine, should it die
                        Pass            one pass of a job that somebody watches
                        Answered        the result of a job
                        Failed          of a job, reload or scrape: the error in neutral words
                        Reloaded, Scraped, ReportWanted

Messages are MessagePack arrays, one after another. Nothing on the wire can name code. They travel over a socket of
the operating system, not over a message queue, because both ends must know at once that the other has died. The end
of file cancels a dead worker's jobs and fails the callers of a dead engine, and nothing is left in a queue for a
process that has gone. It is also eight times faster here than ZeroMQ's asyncio sockets.

Modules: `messages` is what is said and `wire` how; `remote` and `worker` run in a worker; `models`, `server` and
`engine` in the engine's process; `metering` adds up the metrics; `children` and `supervisor` start and end processes.
"""
