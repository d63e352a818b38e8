//! The shell of [`cache::directory`]: what this node says of its blocks, hears of others' and is asked.
//!
//! A lock is held for one machine at a time and never across an await.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant as Moment};

use cache::directory::{
    CallId, Owner, OwnerConfig, Reporter, ReporterConfig, ReporterInput, ReporterOutput,
};
use cache::{BlockHash, NameChange};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use protocol::directory::{Found, HOLDERS_MAX, Heard, Holder, QUERY, Query, REPORT, Report};
use protocol::{Instant, Machine, NodeId};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::mesh::{CODE_FAILED, Call, Roster, random};
use crate::metrics::Sample;

/// See the module.
pub(super) struct Directory {
    origin: Moment,
    roster: Arc<Roster>,
    own: NodeId,
    state: Mutex<State>,
    /// Something is due earlier than the task knows.
    wake: Notify,
}

struct State {
    reporter: Reporter,
    owner: Owner,
    members: Vec<NodeId>,
}

impl Directory {
    /// `None` if the node is in no mesh.
    pub fn start(roster: &Arc<Roster>, stop: CancellationToken) -> Option<Arc<Directory>> {
        let seed = || u64::from_le_bytes(random());
        let directory = Arc::new(Directory {
            origin: Moment::now(),
            own: roster.mesh()?.node(),
            roster: roster.clone(),
            state: Mutex::new(State {
                reporter: Reporter::new(ReporterConfig::default(), seed()),
                owner: Owner::new(OwnerConfig::default(), seed()),
                members: Vec::new(),
            }),
            wake: Notify::new(),
        });
        tokio::spawn(directory.clone().run(stop));
        Some(directory)
    }

    /// A replica's blocks can be had here from now on.
    pub fn serve(self: &Arc<Self>, identity: [u8; 32]) {
        self.report(ReporterInput::Serve { identity });
    }

    /// Blocks that can be had here now, or not any more, in order.
    pub fn changed(self: &Arc<Self>, identity: [u8; 32], changes: &[NameChange]) {
        let is_stored = |change: &NameChange| matches!(change, NameChange::Stored(_));
        for run in changes.chunk_by(|a, b| is_stored(a) == is_stored(b)) {
            let names: Vec<_> = run.iter().map(|change| name_of(change).short()).collect();
            // With one shard it does not matter with which block a sequence begins.
            let first = names[0];
            self.report(match is_stored(&run[0]) {
                true => ReporterInput::Stored { identity, first, names },
                false => ReporterInput::Removed { identity, names },
            });
        }
    }

    /// Who is said to have a beginning of this, the longest first, this node among them: hints, which may
    /// be wrong. Nobody, if no owner answers soon.
    pub async fn holders(&self, identity: [u8; 32], names: &[BlockHash]) -> Vec<Holder> {
        let Some(first) = names.first() else { return Vec::new() };
        let (part, owners) = self.lock().reporter.owners_of(identity, first.short());
        let names = names.iter().map(BlockHash::short).collect();
        let query = Query { part, names, holders_max: HOLDERS_ASKED.min(HOLDERS_MAX) as u16 };
        if owners.contains(&self.own) {
            return self.lock().owner.query(&query).holders;
        }
        let answers = owners.into_iter().map(|owner| self.ask(owner, &query));
        first_good(answers).await.unwrap_or_default().holders
    }

    /// Takes a call of a member, if it is about the directory.
    pub async fn answer(&self, call: Call) {
        let Call { from, request, stream } = call;
        let now = self.now();
        let answer = match request.method.as_str() {
            REPORT => Report::from_bytes(&request.body)
                .map(|report| self.lock().owner.told(now, from, report).to_bytes()),
            _ => Query::from_bytes(&request.body)
                .map(|query| self.lock().owner.query(&query).to_bytes()),
        };
        // The caller may be gone; it says or asks it again.
        let _ = match answer {
            Ok(answer) => stream.reply(answer).await,
            Err(error) => stream.refuse(CODE_FAILED, &error.to_string()).await,
        };
        self.wake.notify_one();
    }

    pub fn samples(&self) -> Vec<Sample> {
        let state = self.lock();
        let (reporter, owner) = (state.reporter.stats(), state.owner.stats());
        drop(state);
        let sample = |name, n: usize| Sample::new(name, n as f64);
        vec![
            sample("grapevine_kv_directory_names", owner.names),
            sample("grapevine_kv_directory_nodes", owner.nodes),
            sample("grapevine_kv_directory_owners_behind", reporter.links - reporter.links_well),
            Sample::new("grapevine_kv_directory_reports_total", reporter.reports as f64),
            Sample::new("grapevine_kv_directory_events_total", reporter.events as f64),
            Sample::new("grapevine_kv_directory_dumped_total", reporter.dumped as f64),
            Sample::new("grapevine_kv_directory_unequal_total", owner.unequal as f64),
        ]
    }

    async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let next = {
                let state = self.lock();
                [state.reporter.next_deadline(), state.owner.next_deadline()]
            };
            let wait = next.into_iter().flatten().min();
            let wait = wait.map_or(LOOK, |at| at.saturating_since(self.now()));
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {
                    let now = self.now();
                    self.lock().owner.tick(now);
                    self.report(ReporterInput::Timer);
                }
                () = self.wake.notified() => {}
                _ = look.tick() => self.look(),
            }
        }
    }

    /// Tells the machines who is a member.
    fn look(self: &Arc<Self>) {
        let members = self.roster.members_present();
        let now = self.now();
        let mut state = self.lock();
        if state.members == members {
            return;
        }
        state.members.clone_from(&members);
        state.owner.members(now, members.iter().copied());
        drop(state);
        self.report(ReporterInput::Members(members));
    }

    fn report(self: &Arc<Self>, input: ReporterInput) {
        let mut out = Vec::new();
        self.lock().reporter.handle(self.now(), input, &mut out);
        for ReporterOutput::Tell { owner, call, report } in out {
            let this = self.clone();
            tokio::spawn(async move { this.tell(owner, call, report).await });
        }
        self.wake.notify_one();
    }

    async fn tell(self: Arc<Self>, owner: NodeId, call: CallId, report: Report) {
        let heard = match owner == self.own {
            true => Some(self.lock().owner.told(self.now(), self.own, report)),
            false => {
                let answer = self.call(owner, REPORT, report.to_bytes(), TELL_WAIT).await;
                answer.and_then(|bytes| Heard::from_bytes(&bytes).ok())
            }
        };
        self.report(match heard {
            Some(heard) => ReporterInput::Answered { call, heard },
            None => ReporterInput::Failed { call },
        });
    }

    async fn ask(&self, owner: NodeId, query: &Query) -> Option<Found> {
        let answer = self.call(owner, QUERY, query.to_bytes(), QUERY_WAIT).await?;
        Found::from_bytes(&answer).ok()
    }

    async fn call(
        &self,
        to: NodeId,
        method: &str,
        body: Vec<u8>,
        within: Duration,
    ) -> Option<Vec<u8>> {
        let calling = async {
            self.roster.connect(to).await.ok()?;
            self.roster.mesh()?.call(to, method, body, within).await.ok()
        };
        tokio::time::timeout(within, calling).await.ok().flatten()
    }

    fn now(&self) -> Instant {
        Instant::ORIGIN + self.origin.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the directory has the names that are in the pools of the nodes that have tiers below theirs. Under
/// the model's own identity these tell all that they have, in whatever tier: that is what can be fetched.
pub(super) fn pool_part(mut identity: [u8; 32]) -> [u8; 32] {
    identity.iter_mut().for_each(|byte| *byte ^= 0xff);
    identity
}

/// The first answer of an owner that knows anything; without one, what any of them answered. All are asked
/// at once: one that is dead and not known for it would otherwise cost every request a wait.
async fn first_good(
    answers: impl IntoIterator<Item = impl Future<Output = Option<Found>>>,
) -> Option<Found> {
    let mut answers: FuturesUnordered<_> = answers.into_iter().collect();
    let mut found = None;
    while let Some(answer) = answers.next().await {
        match answer {
            Some(answer) if answer.nodes > 0 => return Some(answer),
            answer => found = found.or(answer),
        }
    }
    found
}

fn name_of(change: &NameChange) -> &BlockHash {
    match change {
        NameChange::Stored(name) | NameChange::Removed(name) => name,
    }
}

/// How often the members are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// As [`ReporterConfig::answer_wait`].
const TELL_WAIT: Duration = Duration::from_secs(2);
/// Longest wait for an owner before a prompt is planned without its answer.
const QUERY_WAIT: Duration = Duration::from_millis(100);
const HOLDERS_ASKED: usize = 8;

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;

    use super::*;

    #[test]
    fn one_owner_that_answers_is_enough() {
        let found = |nodes| Some(Found { nodes, ..Found::default() });
        let says = |answer: Option<Found>| -> BoxFuture<'static, _> { ready(answer).boxed() };
        let silent = || -> BoxFuture<'static, _> { pending().boxed() };
        for (what, answers, expect) in [
            ("the first is silent", vec![silent(), says(found(3))], Some(found(3))),
            ("the second is", vec![says(found(3)), silent()], Some(found(3))),
            ("the first cannot be reached", vec![says(None), says(found(3))], Some(found(3))),
            ("the first is new", vec![says(found(0)), says(found(3))], Some(found(3))),
            ("both are new", vec![says(found(0)), says(found(0))], Some(found(0))),
            ("one is new, one cannot be reached", vec![says(found(0)), says(None)], Some(found(0))),
            ("neither can be", vec![says(None), says(None)], Some(None)),
            ("there is none", vec![], Some(None)),
            ("one is new, and the other may know", vec![says(found(0)), silent()], None),
        ] {
            assert_eq!(first_good(answers).now_or_never(), expect, "{what}");
        }
    }
}
