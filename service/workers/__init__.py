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
    engine -> worker    Serving         all a worker needs to serve a model: tokenizer, configuration, card, limits
                        Status          does it take work, how full is the queue
                        Base            counters that would go with the engine, should it die
                        Pass            one pass of a job that somebody watches
                        Answered        the result of a job
                        Failed          of a job, reload or scrape: the error in neutral words
                        Reloaded, Scraped, ReportWanted

Messages are arrays of MessagePack one after another; nothing on the wire can name code. A stream of the operating
system's own, and not a message queue in between, because both ends must know at once that the other has died: its
end of file is what cancels a dead worker's jobs and fails the callers of a dead engine, and nothing lies in a queue
for a process that is no more. It is also eight times faster here than ZeroMQ's asyncio sockets.

Names of rooms: `messages` what is said, `wire` how; `remote` and `worker` in a worker; `models`, `server` and
`engine` in the engine's process; `metering` the sum of all; `children` and `supervisor` births and deaths.
"""
