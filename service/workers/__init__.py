"""API workers: processes that speak HTTP and gRPC, apart from the one that computes.

                      supervisor            the process that was started: signals, ports, child processes; no requests
             pipe ┌────────┴──┬───────┐
               engine      worker   worker    each ends when its pipe from the supervisor does
    private Unix │ socket ─────┴───────┘
      (0700)     │
    Host, one or more BatchingEngines         the same port for every worker (SO_REUSEPORT): FrontEnd,
                                              Denoiser, tokenizer, RemoteEngine; no model

    worker -> engine    Hello           the worker's name; the counters of an engine that died, as far as it knows them
                        Submit          a job, and the digest of the model its tokens were made for
                        Cancel          its caller left
                        Adopted         no more jobs for the model before this one
                        Reload, Scrape  asked of any worker, answered by the engine for the whole server
                        Report          the worker's own counters
                        Leave           this connection will end because the worker was asked to end
    engine -> worker    Serving         all a worker needs to serve a model: tokenizer, configuration, card, limits
                        Status          whether it takes work, and how full the queue is
                        Base            counters that would be lost if the engine died
                        Pass            one pass of a job whose passes are watched
                        Answered        the result of a job
                        Failed          the error of a job, reload or scrape, by its neutral code
                        Reloaded, Scraped, ReportWanted

Messages are MessagePack arrays, one after another: unlike pickles, they cannot run code. They are sent over a Unix
socket and not through a message queue, because both ends must know at once that the other has died: the end of file
cancels a dead worker's jobs and fails the callers of a dead engine, and nothing stays queued for a process that has
gone. It is also eight times faster here than ZeroMQ's asyncio sockets.

Modules: `messages` defines the messages and `wire` sends them; `remote` and `worker` run in a worker; `models`,
`server` and `engine` in the engine's process; `metering` adds up the metrics; `children` and `supervisor` start and
end processes.
"""
