//! The shell around a replica: one OS thread for each model, with a bounded inbox, that steps as long
//! as there is work. It never waits for a client.
//!
//! Bounds: [`INBOX_MAX`] commands wait (then 429); [`EVENTS_MAX`] events of one request wait (then the
//! request is given up, since its client is thousands of tokens behind). A client that leaves drops
//! its receiver; the thread sees that before the next step and cancels the request.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use cache::tiers::TiersStats;
use engine::replica::{
    EmbedRequest, Event, Events, GenerateRequest, Replica, RequestError, ScoreRequest,
};
use protocol::transfer::KvFormat;
use protocol::{Instant, RequestId};
use tokio::sync::{mpsc, oneshot};

use crate::kv::{self, PoolCommand, PoolEvent, PoolQueue};
use crate::metrics::ModelMetrics;

/// What the thread drives: `engine::replica::Replica`, or a script in tests.
pub trait Core: Send + 'static {
    /// Takes a request on. Gives what can be said of it at once: the events of what was generated
    /// before. An error changes nothing.
    fn submit(&mut self, now: Instant, work: Work) -> Result<Vec<Event>, RequestError>;
    /// Ends a request without further events; its blocks are free after the next step.
    fn cancel(&mut self, now: Instant, request: RequestId);
    /// One forward pass, and what came of it. Called whenever requests are open.
    fn step(&mut self, clock: &dyn Fn() -> Instant, events: &mut Events) -> StepReport;
    fn stats(&self) -> Stats;
    /// What its blocks are, if it gives blocks to peers and takes theirs; the methods below are called
    /// only then.
    fn kv_format(&self) -> Option<KvFormat> {
        None
    }
    /// Something about blocks, between steps.
    fn pool(&mut self, _now: Instant, _command: PoolCommand, _events: &mut Vec<PoolEvent>) {}
    /// What the last step or command did to blocks that peers want.
    fn served(&mut self, _events: &mut Vec<PoolEvent>) {}
    /// Whether there is something to compute though no request is open: prefills for peers.
    fn has_work(&self) -> bool {
        false
    }
    /// What can be done while no request is open, a little at a time. True if it wants to be called
    /// again soon.
    fn idle(&mut self, _now: Instant) -> bool {
        false
    }
}

/// A request to a replica.
#[derive(Clone, Debug)]
pub enum Work {
    Generate(Box<GenerateRequest>),
    Embed(EmbedRequest),
    Score(ScoreRequest),
}

impl Work {
    pub fn request(&self) -> RequestId {
        match self {
            Work::Generate(r) => r.request,
            Work::Embed(r) => r.request,
            Work::Score(r) => r.request,
        }
    }

    /// Number of final events to come.
    fn choices(&self) -> usize {
        match self {
            Work::Generate(r) => r.choices,
            Work::Embed(_) | Work::Score(_) => 1,
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Tokens computed; 0 means that nothing could run now.
    pub tokens: usize,
}

/// State of a replica, for the gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub blocks_free: usize,
    pub blocks_used: usize,
    pub blocks_cached: usize,
    pub running: usize,
    pub waiting: usize,
    /// Prompt tokens not yet computed, of all of them.
    pub prompt_tokens_left: u64,
    /// Prompt tokens per second of late; 0 while nothing has been measured.
    pub prompt_rate: u32,
    /// A step that only decodes, of late; zero while nothing has been measured.
    pub decode_step: protocol::Duration,
    /// Since the start.
    pub preemptions: u64,
    /// What lies below the pool, if anything does.
    pub tiers: Option<TiersStats>,
    /// What a block takes to come up from there, of late; zero while none has.
    pub block_time_below: protocol::Duration,
}

impl Core for Replica {
    fn submit(&mut self, now: Instant, work: Work) -> Result<Vec<Event>, RequestError> {
        match work {
            Work::Generate(request) => return self.generate(now, *request),
            Work::Embed(request) => self.embed(now, request)?,
            Work::Score(request) => self.score(now, request)?,
        }
        Ok(Vec::new())
    }

    fn cancel(&mut self, now: Instant, request: RequestId) {
        Replica::cancel(self, now, request);
    }

    fn step(&mut self, clock: &dyn Fn() -> Instant, events: &mut Events) -> StepReport {
        let report = Replica::step(self, clock, events);
        log_findings(self);
        match report {
            Some(report) => StepReport { tokens: report.prefill_tokens + report.decode_tokens },
            None => {
                self.tick(clock(), events);
                StepReport { tokens: 0 }
            }
        }
    }

    fn stats(&self) -> Stats {
        let stats = Replica::stats(self);
        Stats {
            blocks_free: stats.blocks_free,
            blocks_used: stats.blocks_used,
            blocks_cached: stats.blocks_cached,
            running: stats.running,
            waiting: stats.waiting,
            prompt_tokens_left: stats.prompt_tokens_left,
            prompt_rate: stats.prompt_rate,
            decode_step: stats.decode_step,
            preemptions: stats.preemptions,
            tiers: self.tier_stats(),
            block_time_below: self.block_time_below().unwrap_or_default(),
        }
    }

    fn kv_format(&self) -> Option<KvFormat> {
        Some(Replica::kv_format(self))
    }

    fn pool(&mut self, now: Instant, command: PoolCommand, events: &mut Vec<PoolEvent>) {
        kv::execute(self, now, command, events);
    }

    fn served(&mut self, events: &mut Vec<PoolEvent>) {
        kv::served(self, events);
    }

    fn has_work(&self) -> bool {
        Replica::has_work(self)
    }

    fn idle(&mut self, now: Instant) -> bool {
        let more = Replica::idle(self, now);
        log_findings(self);
        more
    }
}

fn log_findings(replica: &mut Replica) {
    for finding in replica.take_findings() {
        tracing::warn!("{finding}");
    }
}

/// An event, with the index of the part of the submission that it belongs to.
pub type PartEvent = (usize, Event);

/// A refused submission.
#[derive(Debug)]
pub enum SubmitError {
    Request(RequestError),
    /// The inbox is full.
    Busy,
    /// The thread has ended.
    Stopped,
}

/// The way to a replica's thread. Cheap to clone; the thread ends when the last one is dropped.
#[derive(Clone)]
pub struct ReplicaHandle {
    inbox: SyncSender<Command>,
    pool: Arc<PoolQueue>,
    kv_format: Option<KvFormat>,
    running: Arc<AtomicBool>,
    /// As it was after the last step.
    stats: Arc<Mutex<Stats>>,
    clock: Clock,
}

/// The time of a replica.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

enum Command {
    Submit(Submission),
    /// There is something in the pool's queue.
    Wake,
}

struct Submission {
    parts: Vec<Work>,
    events: mpsc::Sender<PartEvent>,
    reply: oneshot::Sender<Result<Vec<PartEvent>, RequestError>>,
}

impl ReplicaHandle {
    /// Starts the thread. `clock` gives the time; `metrics` is written after each step.
    pub fn spawn(
        name: &str,
        core: Box<dyn Core>,
        clock: Clock,
        metrics: ModelMetrics,
    ) -> std::io::Result<(ReplicaHandle, JoinHandle<()>)> {
        let (inbox, commands) = sync_channel(INBOX_MAX);
        let model = name.to_owned();
        let running = Arc::new(AtomicBool::new(true));
        let pool = Arc::new(PoolQueue::default());
        let alive = Alive { running: running.clone(), pool: pool.clone() };
        let kv_format = core.kv_format();
        let stats = Arc::new(Mutex::new(core.stats()));
        let published = stats.clone();
        let time = clock.clone();
        let thread =
            std::thread::Builder::new().name(format!("replica {name}")).spawn(move || {
                let shell = Shell {
                    core,
                    clock: time,
                    metrics,
                    pool: alive.pool.clone(),
                    requests: BTreeMap::new(),
                    published,
                    unsettled: false,
                    preemptions: 0,
                };
                // A panic ends this replica only: its clients get an error, and the model is reported
                // as unavailable. Nothing of the broken state is used again.
                let run = AssertUnwindSafe(|| shell.run(commands, alive));
                if std::panic::catch_unwind(run).is_err() {
                    tracing::error!(
                        model,
                        "the replica has panicked and is stopped: restart the node"
                    );
                }
            })?;
        Ok((ReplicaHandle { inbox, pool, kv_format, running, stats, clock }, thread))
    }

    /// What its blocks are, if it exchanges blocks with peers.
    pub fn kv_format(&self) -> Option<KvFormat> {
        self.kv_format
    }

    /// Has something done to its blocks, after the step that it is in.
    pub(crate) fn pool(&self, command: PoolCommand) {
        self.pool.push(command);
        // Where the inbox is full or gone, it looks, or has ended.
        let _ = self.inbox.try_send(Command::Wake);
    }

    /// The answers to [`pool`](Self::pool), for one listener.
    pub(crate) fn pool_events(&self) -> mpsc::UnboundedReceiver<PoolEvent> {
        self.pool.listen()
    }

    /// False once the thread has ended.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// How much it has to do, as of its last step.
    pub fn stats(&self) -> Stats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A moment of this process in the replica's time; one that has passed is now.
    pub fn time_of(&self, moment: std::time::Instant) -> Instant {
        let left = moment.saturating_duration_since(std::time::Instant::now());
        let left = u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
        (self.clock)() + protocol::Duration::from_nanos(left)
    }

    /// Hands the parts of one client request over. Gives the events of what was generated before; all
    /// others arrive in the receiver, and dropping it cancels them. After an error no part runs.
    pub async fn submit(
        &self,
        parts: Vec<Work>,
    ) -> Result<(Vec<PartEvent>, mpsc::Receiver<PartEvent>), SubmitError> {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let (reply, answer) = oneshot::channel();
        let submission = Command::Submit(Submission { parts, events, reply });
        self.inbox.try_send(submission).map_err(|error| match error {
            TrySendError::Full(_) => SubmitError::Busy,
            TrySendError::Disconnected(_) => SubmitError::Stopped,
        })?;
        match answer.await {
            Ok(Ok(replayed)) => Ok((replayed, receiver)),
            Ok(Err(error)) => Err(SubmitError::Request(error)),
            Err(_) => Err(SubmitError::Stopped),
        }
    }
}

/// Says at its end that the replica does not run any more.
struct Alive {
    running: Arc<AtomicBool>,
    pool: Arc<PoolQueue>,
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.running.store(false, Ordering::Release);
        self.pool.close();
    }
}

struct Shell {
    core: Box<dyn Core>,
    clock: Clock,
    metrics: ModelMetrics,
    pool: Arc<PoolQueue>,
    requests: BTreeMap<RequestId, Open>,
    published: Arc<Mutex<Stats>>,
    /// A request was cancelled since the last step: the next one frees its blocks.
    unsettled: bool,
    preemptions: u64,
}

/// A request whose last event has not been delivered.
struct Open {
    events: mpsc::Sender<PartEvent>,
    part: usize,
    choices_open: usize,
}

impl Shell {
    fn run(mut self, inbox: Receiver<Command>, alive: Alive) {
        // Goes before the inbox and the streams do: nobody sees them closed and the replica alive.
        let _alive = alive;
        let mut events = Vec::new();
        let mut stalled = false;
        loop {
            if self.requests.is_empty() && !self.unsettled && !self.core.has_work() {
                match self.receive(&inbox) {
                    Ok(command) => self.take(command.unwrap_or(Command::Wake)),
                    Err(_) => return,
                }
            } else if stalled {
                match inbox.recv_timeout(STALL_WAIT) {
                    Ok(command) => self.take(command),
                    Err(RecvTimeoutError::Timeout) => {}
                    // Running requests still have clients: they are finished first.
                    Err(RecvTimeoutError::Disconnected) if self.requests.is_empty() => return,
                    Err(RecvTimeoutError::Disconnected) => std::thread::sleep(STALL_WAIT),
                }
            }
            for command in inbox.try_iter().take(INBOX_MAX) {
                self.take(command);
            }
            self.serve_pool();
            self.cancel_abandoned();
            self.unsettled = false;
            let began = (self.clock)();
            let report = self.core.step(&*self.clock, &mut events);
            if report.tokens > 0 {
                let took = (self.clock)().saturating_since(began);
                self.metrics.step_time.record(took.as_secs_f64());
                self.metrics.step_tokens.increment(report.tokens as u64);
            }
            stalled = report.tokens == 0 && events.is_empty();
            self.tell_served();
            // Before the events: whoever has seen an answer's end finds it in the gauges.
            self.publish();
            for (request, event) in events.drain(..) {
                self.deliver(request, event);
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.submit(submission),
            Command::Wake => {}
        }
    }

    /// Does what transfers want of the pool.
    fn serve_pool(&mut self) {
        let mut events = Vec::new();
        while let Some(command) = self.pool.pop() {
            self.core.pool((self.clock)(), command, &mut events);
        }
        self.core.served(&mut events);
        self.pool.answer(events.into_iter());
    }

    fn tell_served(&mut self) {
        let mut events = Vec::new();
        self.core.served(&mut events);
        self.pool.answer(events.into_iter());
    }

    /// The next command; until it comes, what can be done while no request is open. `None` if that has
    /// made work: a peer wants the rest of what was brought up for it.
    fn receive(&mut self, inbox: &Receiver<Command>) -> Result<Option<Command>, RecvTimeoutError> {
        loop {
            let more = self.core.idle((self.clock)());
            self.tell_served();
            self.publish();
            if self.core.has_work() {
                return Ok(None);
            }
            let received = match more {
                true => inbox.recv_timeout(STALL_WAIT),
                false => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match received {
                Err(RecvTimeoutError::Timeout) => {}
                received => return received.map(Some),
            }
        }
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { parts, events, reply } = submission;
        if reply.is_closed() {
            return;
        }
        let now = (self.clock)();
        let mut taken: Vec<RequestId> = Vec::with_capacity(parts.len());
        let mut replayed = Vec::new();
        for (part, work) in parts.into_iter().enumerate() {
            let (request, choices) = (work.request(), work.choices());
            // Another ingress has taken the request over: what the first one began ends here, and none of
            // its events reaches the second. The first may still have the client, so it is told why.
            if let Some(Open { events, part, .. }) = self.requests.remove(&request) {
                let error = RequestError::TakenOver;
                let _ = events.try_send((part, Event::Failed { choice: 0, error }));
                self.core.cancel(now, request);
            }
            let said = match self.core.submit(now, work) {
                Ok(said) => said,
                Err(error) => {
                    for request in taken {
                        self.requests.remove(&request);
                        self.core.cancel(now, request);
                    }
                    // The client may have left meanwhile; then nobody wants to know.
                    let _ = reply.send(Err(error));
                    return;
                }
            };
            let over = said.iter().filter(|event| is_last(event)).count();
            replayed.extend(said.into_iter().map(|event| (part, event)));
            if over < choices {
                let open = Open { events: events.clone(), part, choices_open: choices - over };
                self.requests.insert(request, open);
                taken.push(request);
            }
        }
        let _ = reply.send(Ok(replayed));
    }

    fn cancel_abandoned(&mut self) {
        let now = (self.clock)();
        let core = &mut self.core;
        self.requests.retain(|&request, open| {
            let abandoned = open.events.is_closed();
            if abandoned {
                core.cancel(now, request);
            }
            !abandoned
        });
    }

    fn deliver(&mut self, request: RequestId, event: Event) {
        let Some(open) = self.requests.get_mut(&request) else { return };
        let last = is_last(&event);
        let full = match open.events.try_send((open.part, event)) {
            Ok(()) => false,
            Err(mpsc::error::TrySendError::Full(_)) => true,
            // Seen by `cancel_abandoned` before the next step.
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        };
        if full {
            self.metrics.slow_clients.increment(1);
            self.requests.remove(&request);
            self.core.cancel((self.clock)(), request);
            self.unsettled = true;
            return;
        }
        if last {
            open.choices_open = open.choices_open.saturating_sub(1);
            if open.choices_open == 0 {
                self.requests.remove(&request);
            }
        }
    }

    fn publish(&mut self) {
        let stats = self.core.stats();
        *self.published.lock().unwrap_or_else(PoisonError::into_inner) = stats;
        self.metrics.blocks_free.set(stats.blocks_free as f64);
        self.metrics.blocks_used.set(stats.blocks_used as f64);
        self.metrics.blocks_cached.set(stats.blocks_cached as f64);
        self.metrics.running.set(stats.running as f64);
        self.metrics.waiting.set(stats.waiting as f64);
        self.metrics.preemptions.increment(stats.preemptions.saturating_sub(self.preemptions));
        self.preemptions = stats.preemptions;
        if let Some(tiers) = &stats.tiers {
            self.metrics.show_tiers(tiers);
        }
    }
}

/// Whether nothing follows it for its choice.
fn is_last(event: &Event) -> bool {
    !matches!(event, Event::Started { .. } | Event::Token { .. })
}

/// Submissions that wait for the end of a step. Too small: bursts are refused that the batcher's own
/// queue would hold. Too large: clients wait for an answer that is "queue full".
pub const INBOX_MAX: usize = 1024;

/// Events of one request that wait for its client: 16 thousand tokens, some 2 MiB at worst.
pub const EVENTS_MAX: usize = 16_384;

/// How soon a replica that cannot run anything looks again for clients that left and for deadlines.
const STALL_WAIT: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    /// Runs each request for ever and writes down what it is told.
    struct Endless {
        running: Vec<RequestId>,
        told: Arc<Mutex<Vec<&'static str>>>,
    }

    impl Core for Endless {
        fn submit(&mut self, _now: Instant, work: Work) -> Result<Vec<Event>, RequestError> {
            self.told.lock().expect("not poisoned").push("submit");
            self.running.push(work.request());
            Ok(Vec::new())
        }

        fn cancel(&mut self, _now: Instant, request: RequestId) {
            self.told.lock().expect("not poisoned").push("cancel");
            self.running.retain(|&running| running != request);
        }

        fn step(&mut self, _clock: &dyn Fn() -> Instant, events: &mut Events) -> StepReport {
            let started = Event::Started { choice: 0, cached_tokens: 0 };
            events.extend(self.running.iter().map(|&request| (request, started.clone())));
            std::thread::sleep(Duration::from_millis(1));
            StepReport { tokens: self.running.len() }
        }

        fn stats(&self) -> Stats {
            Stats::default()
        }
    }

    #[tokio::test]
    async fn a_request_that_comes_again_takes_the_place_of_the_first() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let core = Box::new(Endless { running: Vec::new(), told: told.clone() });
        let metrics = Metrics::new().expect("metrics").model("m");
        let clock: Clock = Arc::new(|| Instant::ORIGIN);
        let (handle, thread) = ReplicaHandle::spawn("m", core, clock, metrics).expect("a thread");
        let ask = || {
            let request = GenerateRequest::new(RequestId(7), vec![1]);
            handle.submit(vec![Work::Generate(Box::new(request))])
        };
        let (_, mut first) = ask().await.expect("taken");
        assert!(first.recv().await.is_some(), "it runs");
        let (_, mut second) = ask().await.expect("taken");
        // Whatever was on its way, then the end.
        let mut last = None;
        while let Some((_, event)) = first.recv().await {
            last = Some(event);
        }
        let taken_over = Event::Failed { choice: 0, error: RequestError::TakenOver };
        assert_eq!(last, Some(taken_over), "it hears why");
        assert!(second.recv().await.is_some(), "it runs");
        assert_eq!(*told.lock().expect("not poisoned"), ["submit", "cancel", "submit"]);
        drop((second, handle));
        tokio::task::spawn_blocking(|| thread.join().expect("it ends")).await.expect("it ends");
    }
}
