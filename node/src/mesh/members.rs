//! The shell of membership: a thread of its own, so that a busy runtime or a stalled disk of the
//! inference side never makes this node look dead.
//!
//! It waits for datagrams and timers, hands them to the machine and does what that says: datagrams
//! leave by the data plane, what must be durable is written before anything after it is sent. It never
//! waits for a peer: who is not connected is dialled by a task, and the datagram goes when that is done.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use protocol::identity::join::Contact;
use protocol::membership::{
    Addresses, Destination, MemberState, Membership, MembershipConfig, MembershipConfigError,
    MembershipEvent, MembershipInput, MembershipOutput, MembershipStats,
};
use protocol::{Duration, Instant, Machine, NodeId};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

use super::Mesh;

type Machinery = Membership<NodeId, Addresses>;

/// Why the thread of membership cannot run.
#[derive(Debug, Error)]
pub enum MembersError {
    #[error("membership cannot be set up so")]
    Config(#[from] MembershipConfigError),
    #[error("{path} cannot be used")]
    Disk { path: PathBuf, source: std::io::Error },
    #[error("{path} does not hold a number: it is damaged; remove it")]
    Damaged { path: PathBuf },
    #[error("more than {} addresses are announced", protocol::membership::ADDRESSES_MAX)]
    Addresses,
    #[error("no thread for membership")]
    Thread(#[source] std::io::Error),
}

/// One member as this node sees it.
#[derive(Clone, Debug)]
pub struct MemberLine {
    pub node: NodeId,
    pub state: MemberState,
    pub incarnation: u64,
    pub addresses: Vec<SocketAddr>,
    /// Since it is in this state, or was last seen to change.
    pub age: Duration,
    pub rtt: Option<Duration>,
}

/// The way to the thread. Dropping it ends the thread without a farewell.
pub(crate) struct Members {
    inbox: SyncSender<Command>,
    /// Members that are not well.
    absent: watch::Receiver<BTreeMap<NodeId, Absence>>,
}

/// What is wrong with a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Absence {
    /// It may refute that.
    Suspected,
    /// Dead, or left.
    Gone,
}

enum Command {
    Datagram { from: NodeId, bytes: Bytes },
    Check(NodeId),
    Path { node: NodeId, relayed: bool },
    View(oneshot::Sender<(Vec<MemberLine>, MembershipStats)>),
    Leave(oneshot::Sender<()>),
}

impl Members {
    /// Starts the thread. Seeds are asked for the mesh's view; `data` keeps the incarnation.
    pub fn start(
        mesh: Mesh,
        data: &Path,
        seeds: Vec<Addresses>,
        seed: u64,
    ) -> Result<Members, MembersError> {
        let file = IncarnationFile { path: data.join("incarnation") };
        let incarnation = file.read()?.map_or(0, |last| last + 1);
        let contact = Addresses::new(mesh.contact().addresses.iter().copied())
            .ok_or(MembersError::Addresses)?;
        let config = MembershipConfig::default();
        let machine = Machinery::new(config, mesh.node(), contact, incarnation, 0, seed)?;
        let (inbox, commands) = sync_channel(INBOX_MAX);
        let (absent_sender, absent) = watch::channel(BTreeMap::new());
        let (dials, wanted) = mpsc::channel(DIALS_MAX);
        tokio::spawn(dial_all(mesh.clone(), wanted));
        let shell = Shell { machine, mesh, file, dials, absent: absent_sender, leaving: None };
        std::thread::Builder::new()
            .name("membership".to_owned())
            .spawn(move || shell.run(&commands, seeds))
            .map_err(MembersError::Thread)?;
        Ok(Members { inbox, absent })
    }

    /// Hands a datagram over; a full inbox drops it, as the network might have.
    pub fn datagram(&self, from: NodeId, bytes: Bytes) {
        let _ = self.inbox.try_send(Command::Datagram { from, bytes });
    }

    /// The path to a node is broken: membership looks at it now.
    pub fn check(&self, node: NodeId) {
        let _ = self.inbox.try_send(Command::Check(node));
    }

    /// How packets to a node travel.
    pub fn path(&self, node: NodeId, relayed: bool) {
        let _ = self.inbox.try_send(Command::Path { node, relayed });
    }

    /// Everyone, and the counters; empty if the thread is too busy to say.
    pub async fn view(&self) -> (Vec<MemberLine>, MembershipStats) {
        let (reply, answer) = oneshot::channel();
        let _ = self.inbox.try_send(Command::View(reply));
        let answered = tokio::time::timeout(VIEW_TIMEOUT, answer).await;
        answered.ok().and_then(Result::ok).unwrap_or_default()
    }

    /// Returns when the node is gone, or has been suspected for [`silence_max`] without a break: on a
    /// bad network healthy nodes are suspected for a moment now and then. `rtt` says that of its path.
    pub async fn lost(&self, node: NodeId, rtt: impl Fn() -> Duration) {
        let mut absent = self.absent.clone();
        loop {
            let state = absent.borrow_and_update().get(&node).copied();
            let changed = absent.wait_for(|absent| absent.get(&node).copied() != state);
            // An error of the wait means that the thread is gone with the node itself.
            let is_open = match state {
                Some(Absence::Gone) => return,
                Some(Absence::Suspected) => {
                    match tokio::time::timeout(silence_max(rtt()), changed).await {
                        Ok(changed) => changed.is_ok(),
                        Err(_) => return,
                    }
                }
                None => changed.await.is_ok(),
            };
            if !is_open {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Members that are suspected at this moment.
    pub fn suspected(&self) -> Vec<NodeId> {
        let absent = self.absent.borrow();
        let suspected = absent.iter().filter(|(_, absence)| **absence == Absence::Suspected);
        suspected.map(|(node, _)| *node).collect()
    }

    /// Says farewell and waits until it is said, at most [`LEAVE_TIMEOUT`].
    pub async fn leave(&self) {
        let (reply, done) = oneshot::channel();
        let _ = self.inbox.try_send(Command::Leave(reply));
        let _ = tokio::time::timeout(LEAVE_TIMEOUT, done).await;
    }
}

struct Shell {
    machine: Machinery,
    mesh: Mesh,
    file: IncarnationFile,
    dials: mpsc::Sender<Dial>,
    absent: watch::Sender<BTreeMap<NodeId, Absence>>,
    leaving: Option<oneshot::Sender<()>>,
}

/// A datagram for who is not connected.
struct Dial {
    node: Option<NodeId>,
    addresses: Vec<SocketAddr>,
    bytes: Bytes,
}

impl Shell {
    fn run(mut self, commands: &Receiver<Command>, seeds: Vec<Addresses>) {
        let origin = std::time::Instant::now();
        let now = || Instant::ORIGIN + origin.elapsed();
        let mut out = Vec::new();
        self.machine.handle(now(), MembershipInput::Start { seeds }, &mut out);
        while self.act(&mut out) {
            let wait = self.machine.next_deadline().map_or(WAIT_MAX, |d| d - now()).min(WAIT_MAX);
            let input = match commands.recv_timeout(wait) {
                Ok(Command::Datagram { from, bytes }) => {
                    MembershipInput::Datagram { from, bytes: bytes.to_vec() }
                }
                Ok(Command::Check(node)) => MembershipInput::Check { node },
                Ok(Command::Path { node, relayed }) => MembershipInput::Path { node, relayed },
                Ok(Command::View(reply)) => {
                    let _ = reply.send(self.view(now()));
                    continue;
                }
                Ok(Command::Leave(reply)) => {
                    self.leaving = Some(reply);
                    MembershipInput::Leave
                }
                Err(RecvTimeoutError::Timeout) => MembershipInput::Timer,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            self.machine.handle(now(), input, &mut out);
            // A flood of datagrams must not keep the timers from their turn.
            let now = now();
            if self.machine.next_deadline().is_some_and(|deadline| deadline <= now) {
                self.machine.handle(now, MembershipInput::Timer, &mut out);
            }
        }
        if let Some(reply) = self.leaving {
            let _ = reply.send(());
        }
    }

    /// Does what the machine said; false when it is over.
    fn act(&mut self, out: &mut Vec<MembershipOutput<NodeId, Addresses>>) -> bool {
        for output in out.drain(..) {
            match output {
                MembershipOutput::Send { to, bytes } => self.send(to, bytes.into()),
                MembershipOutput::Persist { incarnation } => {
                    if let Err(error) = self.file.write(incarnation) {
                        tracing::error!(%error, "the incarnation cannot be kept: a restart of this node may be taken for a ghost");
                    }
                }
                MembershipOutput::Event(event) => self.event(&event),
                MembershipOutput::Gone => return false,
            }
        }
        true
    }

    fn send(&self, to: Destination<NodeId, Addresses>, bytes: Bytes) {
        let (node, addresses) = match to {
            Destination::Node(node) => {
                if self.mesh.send_datagram(node, bytes.clone()) {
                    return;
                }
                let contact = self.machine.contact(&node);
                (Some(node), contact.map(|c| c.as_slice().to_vec()).unwrap_or_default())
            }
            Destination::Seed(contact) => {
                let addresses = contact.as_slice();
                // Another connection to who is connected already would end the oldest one, and with it
                // the streams on it.
                let connected = self.mesh.peer_at(addresses).or_else(|| {
                    // Who has another address by now may have been found there.
                    let contacts = self.mesh.identity().contacts(None);
                    let is_it = |c: &Contact| c.addresses.iter().any(|at| addresses.contains(at));
                    let found = contacts.into_iter().find(is_it)?;
                    self.mesh.link(found.node).map(|_| found.node)
                });
                if connected.is_some_and(|node| self.mesh.send_datagram(node, bytes.clone())) {
                    return;
                }
                (None, addresses.to_vec())
            }
        };
        if !addresses.is_empty() {
            // Full: as lost on the way; the machine tries again.
            let _ = self.dials.try_send(Dial { node, addresses, bytes });
        }
    }

    fn event(&self, event: &MembershipEvent<NodeId, Addresses>) {
        use MembershipEvent as E;
        let (node, absence) = match event {
            E::Joined { id, .. } | E::Returned { id, .. } => {
                tracing::info!(node = %id.short(), "a node is here");
                (*id, None)
            }
            E::Refuted { id, .. } => (*id, None),
            E::Suspected { id, .. } => {
                tracing::info!(node = %id.short(), "a node is suspected: others are asked first");
                (*id, Some(Absence::Suspected))
            }
            E::Died { id, .. } => {
                tracing::warn!(node = %id.short(), "a node is dead");
                (*id, Some(Absence::Gone))
            }
            E::Left { id, .. } => {
                tracing::info!(node = %id.short(), "a node has left");
                (*id, Some(Absence::Gone))
            }
            E::Forgotten { id } => (*id, None),
            E::Stalled { late } => {
                tracing::warn!(
                    late_ms = late.as_millis() as u64,
                    "this node was not run for a while"
                );
                return;
            }
            E::Changed { .. } | E::SelfRefuted { .. } => return,
        };
        self.absent.send_if_modified(|absent| match absence {
            Some(absence) => absent.insert(node, absence) != Some(absence),
            None => absent.remove(&node).is_some(),
        });
    }

    fn view(&self, now: Instant) -> (Vec<MemberLine>, MembershipStats) {
        let line = |m: protocol::membership::MemberView<'_, NodeId, Addresses>| MemberLine {
            node: m.id,
            state: m.state,
            incarnation: m.incarnation,
            addresses: m.contact.as_slice().to_vec(),
            age: now - m.since,
            rtt: m.rtt,
        };
        (self.machine.members().map(line).collect(), self.machine.stats())
    }
}

/// Connects to who is wanted and sends what was for them; one attempt at a time for each.
async fn dial_all(mesh: Mesh, mut wanted: mpsc::Receiver<Dial>) {
    let under_way: Arc<Mutex<BTreeSet<SocketAddr>>> = Arc::default();
    while let Some(Dial { node, addresses, bytes }) = wanted.recv().await {
        let Some(&first) = addresses.first() else { continue };
        let lock = || under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = {
            let mut under_way = lock();
            under_way.len() >= DIALS_MAX || !under_way.insert(first)
        };
        if taken {
            continue;
        }
        let (mesh, under_way) = (mesh.clone(), under_way.clone());
        tokio::spawn(async move {
            let direct = async {
                for address in addresses {
                    let connected = mesh.connect(address, node);
                    if let Ok(Ok(node)) = tokio::time::timeout(DIAL_TIMEOUT, connected).await {
                        return Some(node);
                    }
                }
                None
            };
            // Members that are dead here are dialled for a day: others are asked only for those whom they
            // carried once.
            let carried = async {
                let node = node.filter(|&node| mesh.was_carried(node))?;
                mesh.connect_carried(node).await.ok().map(|()| node)
            };
            let reached = tokio::select! {
                Some(node) = direct => Some(node),
                Some(node) = carried => Some(node),
                else => None,
            };
            if let Some(node) = reached {
                mesh.send_datagram(node, bytes);
            }
            under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&first);
        });
    }
}

/// The last incarnation that this identity used, as text.
struct IncarnationFile {
    path: PathBuf,
}

impl IncarnationFile {
    fn read(&self) -> Result<Option<u64>, MembersError> {
        match std::fs::read_to_string(&self.path) {
            Ok(text) => match text.trim().parse() {
                Ok(incarnation) => Ok(Some(incarnation)),
                Err(_) => Err(MembersError::Damaged { path: self.path.clone() }),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(MembersError::Disk { path: self.path.clone(), source }),
        }
    }

    /// Durable when it returns: the bytes first, then their name.
    fn write(&self, incarnation: u64) -> std::io::Result<()> {
        let unfinished = self.path.with_extension("new");
        let mut file = std::fs::File::create(&unfinished)?;
        writeln!(file, "{incarnation}")?;
        file.sync_all()?;
        std::fs::rename(&unfinished, &self.path)?;
        let folder = self.path.parent().unwrap_or(Path::new("."));
        std::fs::File::open(folder)?.sync_all()
    }
}

/// Datagrams and commands that wait for the thread; more are dropped.
const INBOX_MAX: usize = 4096;
/// Dials that wait or are under way; what is for others is dropped.
const DIALS_MAX: usize = 256;
/// Time for one address. Too small: the handshake fails where packets are lost. Too large: a node's other
/// addresses wait.
const DIAL_TIMEOUT: Duration = Duration::from_secs(12);
const VIEW_TIMEOUT: Duration = Duration::from_secs(1);
/// Time to say farewell.
pub(crate) const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Suspicion after which nothing more is awaited from a node: time for a suspect to be heard of, on a
/// path that loses packets. Too small: streams of healthy nodes break there. Too large: clients wait for
/// nodes that hang.
fn silence_max(rtt: Duration) -> Duration {
    SILENCE_MIN + (rtt * 3).min(SILENCE_OF_RTT_MAX)
}
const SILENCE_MIN: Duration = Duration::from_millis(300);
const SILENCE_OF_RTT_MAX: Duration = Duration::from_millis(700);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_incarnation_survives() {
        let dir = tempfile::tempdir().unwrap();
        let file = IncarnationFile { path: dir.path().join("incarnation") };
        assert!(file.read().unwrap().is_none());
        for incarnation in [0, 7, u64::MAX] {
            file.write(incarnation).unwrap();
            assert_eq!(file.read().unwrap(), Some(incarnation));
        }
        std::fs::write(&file.path, "seven").unwrap();
        assert!(matches!(file.read(), Err(MembersError::Damaged { .. })));
    }
}
