//! Copies of streams on other nodes: this node keeps those of others, and has its own kept.
//!
//! Who passes a stream to a client has its journal copied to the member that stands first in
//! [`rank`]'s order, in small batches, one at a time. A keeper that fails is followed by the next and
//! told everything again. Who looks for a stream asks members in the same order.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use protocol::backup::{
    BODY_BYTES_MAX, Begin, ENTRIES_MAX, FETCH, Fetch, Fetched, KEEP, Keep, Kept, rank,
};
use protocol::journal::Entry;
use protocol::{NodeId, RequestId, TenantId};
use scheduler::journals::Journals;
use tokio::sync::{Notify, watch};

use super::Roster;
use super::rpc::{CODE_FAILED, Call, CallError};
use crate::metrics::Sample;

/// A journal that one side writes and the other copies.
pub(crate) type SharedJournal = Arc<Mutex<Vec<Entry>>>;

/// A stream that is being copied. Dropping it ends that; the copy is kept for a while.
pub(crate) struct Copy {
    shared: Arc<Shared>,
    progress: watch::Receiver<Progress>,
    /// Entries that the client may be ahead.
    lag_max: u64,
    /// The keeper is behind: the stream does not wait for it until it has caught up.
    is_late: bool,
}

/// How far the keeper is.
#[derive(Clone, Copy)]
enum Progress {
    /// It has not said anything yet.
    Asked,
    /// Nobody can keep the stream now: there is nothing to wait for.
    Nobody,
    /// It has so many entries.
    Kept(u64),
}

struct Shared {
    journal: SharedJournal,
    /// More entries than should wait, or the end.
    urgent: Notify,
    state: Mutex<State>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// The client has all of it.
    Complete,
    /// Nobody writes any more.
    Left,
}

impl Copy {
    /// Begins to copy. `None` where the request is too large for it. With `is_exact` the client sees
    /// nothing that is not copied: the order of the events of several choices follows from nothing else.
    pub fn start(
        roster: Arc<Roster>,
        key: (TenantId, RequestId),
        begin: Begin,
        journal: SharedJournal,
        is_exact: bool,
    ) -> Option<Copy> {
        if begin.body.len() > BODY_BYTES_MAX {
            return None;
        }
        let (sender, progress) = watch::channel(Progress::Asked);
        let state = Mutex::new(State::Open);
        let shared = Arc::new(Shared { journal, urgent: Notify::new(), state });
        tokio::spawn(copy(roster, key, begin, shared.clone(), sender));
        let lag_max = if is_exact { 0 } else { LAG_MAX };
        Some(Copy { shared, progress, lag_max, is_late: false })
    }

    /// The journal has grown: waits until the keeper has all but the last entries of it, or for a moment.
    pub async fn written(&mut self) {
        let entries = lock(&self.shared.journal).len() as u64;
        let lag = |progress: &Progress| match progress {
            Progress::Asked => u64::MAX,
            Progress::Nobody => 0,
            Progress::Kept(kept) => entries.saturating_sub(*kept),
        };
        let now = lag(&self.progress.borrow());
        if now >= URGENT.min(self.lag_max + 1) {
            self.shared.urgent.notify_one();
        }
        if now <= self.lag_max {
            self.is_late = false;
        } else if !self.is_late {
            let lag_max = self.lag_max;
            let caught_up = self.progress.wait_for(|progress| lag(progress) <= lag_max);
            let caught_up = tokio::time::timeout(LAG_WAIT, caught_up).await;
            self.is_late = !matches!(caught_up, Ok(Ok(_)));
        }
    }

    /// The client has all of it.
    pub fn complete(&self) {
        *lock(&self.shared.state) = State::Complete;
        self.shared.urgent.notify_one();
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        if *state == State::Open {
            *state = State::Left;
        }
        drop(state);
        self.shared.urgent.notify_one();
    }
}

/// Sends a stream to its keeper, as long as it runs.
async fn copy(
    roster: Arc<Roster>,
    (tenant, request): (TenantId, RequestId),
    begin: Begin,
    shared: Arc<Shared>,
    progress: watch::Sender<Progress>,
) {
    let (mut keeper, mut knows, mut kept, mut failed) = (None, false, 0u64, Vec::new());
    let mut said_at = Instant::now();
    loop {
        let state = *lock(&shared.state);
        if state == State::Left {
            return;
        }
        let Some(node) = keeper.or_else(|| roster.keepers(request, &failed).first().copied())
        else {
            let _ = progress.send(Progress::Nobody);
            if state == State::Complete {
                return;
            }
            failed.clear();
            tokio::time::sleep(RETRY).await;
            continue;
        };
        let (entries, total) = {
            let journal = lock(&shared.journal);
            let from = usize::try_from(kept).unwrap_or(usize::MAX).min(journal.len());
            let entries: Vec<Entry> = journal[from..].iter().take(ENTRIES_MAX).cloned().collect();
            (entries, journal.len() as u64)
        };
        let is_complete = state == State::Complete && kept + entries.len() as u64 == total;
        let has_news = !knows || is_complete || !entries.is_empty();
        // Also a sign of life now and then, while a long prompt is computed.
        if has_news || said_at.elapsed() > REFRESH {
            let message = Keep {
                tenant: tenant.as_str().to_owned(),
                request: request.0,
                begin: (!knows).then(|| begin.clone()),
                from: kept,
                entries,
                is_complete,
            };
            said_at = Instant::now();
            match roster.keep_at(node, &message).await {
                Some(Kept::Entries(entries)) => {
                    (keeper, knows, kept) = (Some(node), true, entries);
                    let _ = progress.send(Progress::Kept(kept));
                    if is_complete && kept == total {
                        return;
                    }
                }
                Some(Kept::Unknown) => (knows, kept) = (false, 0),
                Some(Kept::Full) | None => {
                    (keeper, knows, kept) = (None, false, 0);
                    failed.push(node);
                }
            }
        }
        if knows && kept >= total && !is_complete {
            let _ = tokio::time::timeout(BATCH, shared.urgent.notified()).await;
        }
    }
}

impl Roster {
    /// Members that may keep a stream, in the order in which they are asked.
    fn keepers(&self, request: RequestId, failed: &[NodeId]) -> Vec<NodeId> {
        let mut members = self.members_well();
        members.retain(|node| !failed.contains(node));
        ranked(request, members)
    }

    async fn keep_at(&self, node: NodeId, message: &Keep) -> Option<Kept> {
        let asking = async {
            self.connect(node).await.ok()?;
            let reply =
                self.mesh()?.call(node, KEEP, message.to_bytes(), KEEP_TIMEOUT).await.ok()?;
            Kept::from_bytes(&reply).ok()
        };
        tokio::select! {
            kept = tokio::time::timeout(KEEP_TIMEOUT, asking) => kept.ok().flatten(),
            () = self.lost_or_gone(node) => None,
        }
    }

    /// What is known of a tenant's stream, here or at a member. Who kept it may be suspected here, or
    /// just have come back without this node's having heard of it: members are asked again for a moment,
    /// and longer while one of them gives no answer or one was declared dead just now.
    pub(crate) async fn find_stream(
        &self,
        tenant: &TenantId,
        request: RequestId,
    ) -> Option<(Begin, Vec<Entry>)> {
        let key = (tenant.clone(), request);
        let began = Instant::now();
        loop {
            if let Some(found) = lock(self.journals()).fetch(&key, 0, usize::MAX) {
                return Some((found.begin?, found.entries));
            }
            let mut members = ranked(request, self.members_present());
            members.retain(|node| !self.is_own(*node));
            let mut patience = if self.misses_one() {
                FIND_WITHIN
            } else if members.is_empty() {
                Duration::ZERO
            } else {
                NEWS_WITHIN
            };
            for node in members.into_iter().take(FIND_MAX) {
                let asked = tokio::time::timeout(FIND_TIMEOUT, self.fetch_from(node, &key));
                let answer = tokio::select! {
                    answer = asked => answer.unwrap_or(Err(NoAnswer)),
                    () = self.lost_or_gone(node) => Err(NoAnswer),
                };
                match answer {
                    Ok(None) => {}
                    Ok(found) => return found,
                    Err(NoAnswer) => patience = FIND_WITHIN,
                }
            }
            if began.elapsed() >= patience {
                return None;
            }
            tokio::time::sleep(FIND_PAUSE).await;
        }
    }

    /// `None` if the member says that it has no copy.
    async fn fetch_from(
        &self,
        node: NodeId,
        (tenant, request): &(TenantId, RequestId),
    ) -> Result<Option<(Begin, Vec<Entry>)>, NoAnswer> {
        self.connect(node).await.map_err(|_| NoAnswer)?;
        let mesh = self.mesh().ok_or(NoAnswer)?;
        let (mut begin, mut entries) = (None, Vec::new());
        loop {
            let from = entries.len() as u64;
            let fetch = Fetch { tenant: tenant.as_str().to_owned(), request: request.0, from };
            let found = match mesh.call(node, FETCH, fetch.to_bytes(), FIND_TIMEOUT).await {
                Ok(reply) => Fetched::from_bytes(&reply).map_err(|_| NoAnswer)?,
                Err(CallError::Refused { .. }) => return Ok(None),
                Err(_) => return Err(NoAnswer),
            };
            begin = begin.or(found.begin);
            let is_last =
                found.entries.is_empty() || from + found.entries.len() as u64 >= found.total;
            entries.extend(found.entries);
            if is_last {
                return Ok(begin.map(|begin| (begin, entries)));
            }
        }
    }

    /// Answers [`KEEP`] and [`FETCH`].
    pub(super) async fn answer_copies(self: Arc<Self>, call: Call) {
        let reply = match call.request.method.as_str() {
            KEEP => self.take_copy(call.from, &call.request.body),
            _ => self.give_copy(&call.request.body),
        };
        // The caller may be gone; it asks again.
        let _ = match reply {
            Ok(reply) => call.stream.reply(reply).await,
            Err(why) => call.stream.refuse(CODE_FAILED, &why).await,
        };
    }

    fn take_copy(&self, from: NodeId, body: &[u8]) -> Result<Vec<u8>, String> {
        let message = Keep::from_bytes(body).map_err(|error| error.to_string())?;
        let tenant = TenantId::new(&message.tenant).ok_or("the tenant's name is not one")?;
        Ok(lock(self.journals()).keep(self.now(), from, tenant, message).to_bytes())
    }

    fn give_copy(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let Fetch { tenant, request, from } =
            Fetch::from_bytes(body).map_err(|error| error.to_string())?;
        let tenant = TenantId::new(&tenant).ok_or("the tenant's name is not one")?;
        let key = (tenant, RequestId(request));
        let found = lock(self.journals()).fetch(&key, from, ENTRIES_MAX);
        found.map(|found| found.to_bytes()).ok_or_else(|| "no copy of that stream".to_owned())
    }
}

fn ranked(request: RequestId, mut members: Vec<NodeId>) -> Vec<NodeId> {
    members.sort_by_key(|node| std::cmp::Reverse(rank(request, *node)));
    members
}

/// A member did not say whether it has a copy.
struct NoAnswer;

/// What `/metrics` says of the copies kept here.
pub(super) fn samples(journals: &Mutex<Journals>) -> [Sample; 2] {
    let (streams, bytes) = lock(journals).size();
    [
        Sample::new("grapevine_stream_copies", streams as f64),
        Sample::new("grapevine_stream_copies_bytes", bytes as f64),
    ]
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Entries that a client may be ahead of the copy.
const LAG_MAX: u64 = 32;
/// How long a stream waits for its copy, once; then it goes on without.
const LAG_WAIT: Duration = Duration::from_millis(250);
/// Uncopied entries that wait for no batch.
const URGENT: u64 = 16;
/// Between two messages about a stream that has few of them.
const BATCH: Duration = Duration::from_millis(100);
/// Before members are looked at again, where none can keep the stream.
const RETRY: Duration = Duration::from_secs(1);
/// A keeper forgets streams of which it hears nothing.
const REFRESH: Duration = Duration::from_secs(30);
const KEEP_TIMEOUT: Duration = Duration::from_secs(1);
/// Members that are asked for a stream, and how long each.
const FIND_MAX: usize = 8;
const FIND_TIMEOUT: Duration = Duration::from_secs(1);
/// How long members that do not answer are asked again, how long the others, and how often. A round of
/// gossip takes some of the second.
const FIND_WITHIN: Duration = Duration::from_secs(5);
const NEWS_WITHIN: Duration = Duration::from_secs(1);
const FIND_PAUSE: Duration = Duration::from_millis(250);
