//! What this node knows of the others, and what it tells them: members, their records, and which
//! replica to ask.
//!
//! One task keeps it: it exchanges records, forgets who is gone and refreshes this node's own record.
//! Decisions are those of the machines (`protocol::records`, `scheduler::router`); a lock is held for
//! one of them at a time and never across an await.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use protocol::backup::{FETCH, KEEP};
use protocol::directory::{QUERY, REPORT};
use protocol::frame::Frame;
use protocol::membership::{Addresses, MemberState, MembershipStats};
use protocol::node_record::{NodeRecord, ReplicaRecord, ReplicaState};
use protocol::records::{Records, RecordsConfig, RecordsInput, RecordsOutput};
use protocol::{Duration, Instant, Machine, NodeId};
use scheduler::journals::{Journals, JournalsConfig};
use scheduler::router::{ReplicaLoad, Router, RouterConfig};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

mod router;

use super::answer;
use super::apis::{self, Api};
use super::kv_secret::{self, KV_SECRET};
use super::members::{MemberLine, Members, MembersError};
use super::overlay::{Address, Member, OverlayStatus, Path as OverlayPath};
use super::reach::Reach;
use super::{Call, DataStream, FrameStream, Mesh, PeerEvent, Service, random};
use crate::http::App;
use crate::metrics::Sample;

/// See the module. Made before the mesh, whose service it is, and started after it.
pub struct Roster {
    /// For work that outlives a call.
    me: Weak<Roster>,
    origin: std::time::Instant,
    started: OnceLock<Started>,
    state: OnceLock<Mutex<State>>,
    /// Apart from the rest: who chooses a replica waits for nobody who looks at members. Where both are
    /// held, `state` is locked first.
    router: OnceLock<Mutex<Router>>,
    /// Copies of other nodes' streams.
    journals: Mutex<Journals>,
    kv_secret: kv_secret::Kept,
    /// The records' machine has something to do earlier than the task knows.
    wake: Notify,
    stop: CancellationToken,
}

struct Started {
    mesh: Mesh,
    members: Members,
    /// None if there is no overlay: the node goes on without.
    reach: Option<Arc<Reach>>,
    app: Arc<App>,
    name: String,
}

struct State {
    records: Records,
    nodes: BTreeMap<NodeId, Known>,
    present: BTreeSet<NodeId>,
    /// A member was declared dead a moment ago, and may come back.
    misses_one: bool,
    addresses: BTreeMap<NodeId, Vec<SocketAddr>>,
    membership: MembershipStats,
    /// Models under whose name there are different weights, to warn once.
    ambiguous: BTreeSet<String>,
    exchanges: Exchanges,
}

impl State {
    /// Warns once when there are different weights under one name; `several` says of which of the
    /// record's replicas that is so.
    fn warn_of_other_weights(&mut self, record: &NodeRecord, several: Vec<bool>) {
        for (ReplicaRecord { model, .. }, several) in record.replicas.iter().zip(several) {
            if !several {
                self.ambiguous.remove(model);
            } else if self.ambiguous.insert(model.clone()) {
                tracing::warn!(
                    model,
                    "nodes serve different weights under this name: requests go to this node's, \
                     or to those that most nodes have; give one of them another name"
                );
            }
        }
    }
}

/// Exchanges of records that this node began.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Exchanges {
    pub done: u64,
    pub failed: u64,
}

/// A record and when it was last heard.
struct Known {
    record: NodeRecord,
    heard: Instant,
}

/// A line of `vine peers`.
#[derive(Clone, Debug)]
pub struct PeerLine {
    pub member: MemberLine,
    /// None until its record is here.
    pub record: Option<NodeRecord>,
    /// Age of the record.
    pub record_age: Option<Duration>,
    pub own: bool,
    /// Whether the data plane is connected to it, and whether only over a carrier.
    pub connected: bool,
    pub carried: bool,
    /// How the overlay is connected to it.
    pub overlay: Option<OverlayPath>,
}

impl Roster {
    pub fn new() -> Arc<Roster> {
        Arc::new_cyclic(|me| Roster {
            me: me.clone(),
            origin: std::time::Instant::now(),
            started: OnceLock::new(),
            state: OnceLock::new(),
            router: OnceLock::new(),
            journals: Mutex::new(Journals::new(JournalsConfig::default())),
            kv_secret: kv_secret::Kept::new(),
            wake: Notify::new(),
            stop: CancellationToken::new(),
        })
    }

    /// Begins to take part: the thread of membership and the task of records.
    pub(crate) fn start(
        self: &Arc<Self>,
        mesh: Mesh,
        data: &Path,
        app: Arc<App>,
    ) -> Result<(), MembersError> {
        let own = mesh.node();
        let contacts = mesh.identity().contacts(None);
        let seeds = contacts
            .iter()
            .filter(|contact| contact.node != own)
            .filter_map(|contact| Addresses::new(contact.addresses.iter().copied()))
            .collect();
        let members = Members::start(mesh.clone(), data, seeds, u64::from_le_bytes(random()))?;
        let state = State {
            records: Records::new(own, RecordsConfig::default()),
            nodes: BTreeMap::new(),
            present: BTreeSet::new(),
            misses_one: false,
            addresses: BTreeMap::new(),
            membership: MembershipStats::default(),
            ambiguous: BTreeSet::new(),
            exchanges: Exchanges::default(),
        };
        let (policy, disagg) = (app.policy, app.disagg);
        let config = RouterConfig { policy, disagg, ..RouterConfig::default() };
        let _ = self.router.set(Mutex::new(Router::new(own, config)));
        let _ = self.state.set(Mutex::new(state));
        let reach = match Reach::start(&mesh, app.metrics.overlay()) {
            Ok(reach) => Some(reach),
            Err(error) => {
                tracing::warn!(%error, "no overlay: nodes behind a NAT are not found");
                None
            }
        };
        let _ = self.started.set(Started { mesh, members, reach, app, name: host_name() });
        tokio::spawn(self.clone().keep());
        Ok(())
    }

    /// Says farewell to the others and ends the task.
    pub async fn leave(&self) {
        if let Some(started) = self.started.get() {
            started.members.leave().await;
        }
        self.stop.cancel();
    }

    /// Every member, this node first.
    pub async fn peers(&self) -> Vec<PeerLine> {
        let (Some(started), Some(_)) = (self.started.get(), self.state.get()) else {
            return Vec::new();
        };
        let (members, _) = started.members.view().await;
        let (own, now) = (started.mesh.node(), self.now());
        let own_record = self.own_record(started);
        let own_line = MemberLine {
            node: own,
            state: protocol::membership::MemberState::Alive,
            incarnation: 0,
            addresses: started.mesh.contact().addresses.clone(),
            age: now - Instant::ORIGIN,
            rtt: None,
        };
        let mut lines = vec![PeerLine {
            member: own_line,
            record: Some(own_record),
            record_age: Some(Duration::ZERO),
            own: true,
            connected: false,
            carried: false,
            overlay: None,
        }];
        let overlay = self.overlay().unwrap_or_default();
        let path = |node| overlay.peers.iter().find(|peer| peer.node == node).map(|peer| peer.path);
        let state = self.lock();
        lines.extend(members.into_iter().filter(|m| m.node != own).map(|member| {
            let known = state.nodes.get(&member.node);
            PeerLine {
                record: known.map(|k| k.record.clone()),
                record_age: known.map(|k| now - k.heard),
                own: false,
                connected: started.mesh.link(member.node).is_some(),
                carried: started.mesh.link(member.node).is_some()
                    && !started.mesh.is_direct(member.node),
                overlay: path(member.node),
                member,
            }
        }));
        lines
    }

    /// Replicas of other nodes, for the list of models: each model once, ready ones first.
    pub(crate) fn models_elsewhere(&self) -> Vec<ReplicaRecord> {
        if self.state.get().is_none() {
            return Vec::new();
        }
        let mut models: BTreeMap<String, ReplicaRecord> = BTreeMap::new();
        for known in self.lock().nodes.values() {
            for replica in &known.record.replicas {
                let ready = replica.state == ReplicaState::Ready;
                if ready || !models.contains_key(&replica.model) {
                    models.insert(replica.model.clone(), replica.clone());
                }
            }
        }
        models.into_values().collect()
    }

    /// Where clients can turn to, this node first: members that are well and take requests.
    pub(crate) fn apis(&self) -> Vec<Api> {
        let (Some(started), Some(_)) = (self.started.get(), self.state.get()) else {
            return Vec::new();
        };
        let (own, ours) = (started.mesh.node(), &started.mesh.contact().addresses);
        let record = self.own_record(started);
        let suspected = started.members.suspected();
        let state = self.lock();
        let others = state.nodes.iter().filter(|(node, _)| !suspected.contains(node));
        let other = |(&node, known): (&NodeId, &Known)| {
            let theirs = state.addresses.get(&node).map_or(&[][..], Vec::as_slice);
            let near = apis::is_loopback(&record.api) && apis::same_host(ours, theirs);
            let at = apis::worth_telling(&known.record.api, near);
            (known.record.draining, Api { node: Some(node), name: known.record.name.clone(), at })
        };
        let here = Api { node: Some(own), name: record.name.clone(), at: record.api.clone() };
        let all = std::iter::once((record.draining, here)).chain(others.map(other));
        all.filter(|(draining, _)| !draining).map(|(_, api)| api).take(apis::APIS_MAX).collect()
    }

    /// Whether another node has a replica with that name and fingerprint.
    pub(crate) fn has_replica_elsewhere(&self, model: &str, fingerprint: &str) -> bool {
        let is_it = |r: &ReplicaRecord| {
            r.model == model && r.fingerprint == fingerprint && r.state == ReplicaState::Ready
        };
        self.state.get().is_some()
            && self.lock().nodes.values().any(|known| known.record.replicas.iter().any(is_it))
    }

    /// Nodes with a replica of that name and something below its pool; this node is not looked at.
    pub(crate) fn with_tiers(&self, model: &str) -> BTreeSet<NodeId> {
        if self.state.get().is_none() {
            return BTreeSet::new();
        }
        let is_it = |r: &ReplicaRecord| r.model == model && r.below_ns_per_token.is_some();
        let state = self.lock();
        let nodes = state.nodes.iter().filter(|(_, known)| known.record.replicas.iter().any(is_it));
        nodes.map(|(&node, _)| node).collect()
    }

    pub(crate) fn is_own(&self, node: NodeId) -> bool {
        self.mesh().is_some_and(|mesh| mesh.node() == node)
    }

    /// The running mesh, for calls; None before the start.
    pub(crate) fn mesh(&self) -> Option<&Mesh> {
        self.started.get().map(|started| &started.mesh)
    }

    /// The overlay at this moment; None if there is none.
    pub(crate) fn overlay(&self) -> Option<OverlayStatus> {
        Some(self.started.get()?.reach.as_ref()?.status())
    }

    /// Members that are present and have not told this node what they serve, by name.
    pub(crate) fn unheard(&self) -> Vec<String> {
        if self.state.get().is_none() {
            return Vec::new();
        }
        let state = self.lock();
        let unheard = state.present.iter().filter(|node| !state.nodes.contains_key(node));
        unheard.map(NodeId::short).collect()
    }

    /// Connects to a member unless it is connected: at its addresses or, if that takes long or fails, over
    /// another member. Where nothing helps the overlay looks for a way, for the next time.
    pub(crate) async fn connect(&self, node: NodeId) -> Result<(), String> {
        let Some(started) = self.started.get() else { return Err("not started".to_owned()) };
        if started.mesh.link(node).is_some() {
            return Ok(());
        }
        let direct = self.connect_direct(started, node);
        tokio::pin!(direct);
        let failed = tokio::time::timeout(CARRIED_AFTER, &mut direct).await;
        let why = match failed {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(why)) => Some(why),
            Err(_) => None,
        };
        if let Some(reach) = &started.reach {
            reach.want(node);
        }
        let carried = started.mesh.connect_carried(node);
        let carried = tokio::time::timeout(CONNECT_CARRIED_TIMEOUT, carried);
        tokio::pin!(carried);
        let (why, carried) = match why {
            Some(why) => (why, carried.await),
            None => tokio::select! {
                connected = &mut direct => match connected {
                    Ok(()) => return Ok(()),
                    Err(why) => (why, carried.await),
                },
                carried = &mut carried => match carried {
                    Ok(Ok(())) => return Ok(()),
                    nobody => match direct.await {
                        Ok(()) => return Ok(()),
                        Err(why) => (why, nobody),
                    },
                },
            },
        };
        match carried {
            Ok(Ok(())) => Ok(()),
            Ok(Err(nobody)) => Err(format!("{why}; {nobody}")),
            Err(_) => Err(format!("{why}; nobody carried in time")),
        }
    }

    /// Dials a member's addresses, one after the other.
    async fn connect_direct(&self, started: &Started, node: NodeId) -> Result<(), String> {
        let mut addresses = self.lock().addresses.get(&node).cloned().unwrap_or_default();
        // Where a hole is open.
        if let Some(at) = started.reach.as_ref().and_then(|reach| reach.direct(node)) {
            addresses.retain(|address| *address != at);
            addresses.insert(0, at);
        }
        let mut why = "no address of it is known".to_owned();
        for address in addresses {
            let connected = started.mesh.connect(address, Some(node));
            match tokio::time::timeout(CONNECT_TIMEOUT, connected).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) => why = format!("{address}: {error}"),
                Err(_) => why = format!("{address} did not answer in time"),
            }
        }
        Err(why)
    }

    /// Membership probes the node now.
    pub(super) fn check(&self, node: NodeId) {
        if let Some(started) = self.started.get() {
            started.members.check(node);
        }
    }

    /// Returns when nothing is to be awaited from the node any more; see [`Members::lost`].
    pub(crate) async fn lost(&self, node: NodeId) {
        match self.started.get() {
            Some(started) => {
                let rtt = || started.mesh.link(node).map_or(Duration::ZERO, |link| link.rtt());
                started.members.lost(node, rtt).await;
            }
            None => std::future::pending().await,
        }
    }

    /// What `/metrics` says of the mesh.
    pub(crate) fn samples(&self) -> Vec<Sample> {
        let (Some(started), Some(_)) = (self.started.get(), self.state.get()) else {
            return Vec::new();
        };
        let now = self.now();
        let state = self.lock();
        let mut samples = super::samples::of_membership(&state.membership);
        samples.extend(super::samples::of_records(&state.exchanges, state.nodes.len()));
        drop(state);
        let router = self.router();
        samples.extend(super::samples::of_router(&router, now));
        samples.extend(super::samples::of_decisions(router.decisions()));
        drop(router);
        samples.extend(super::copies::samples(&self.journals));
        samples.extend(started.mesh.counters().samples());
        samples.extend(started.mesh.traffic().samples());
        samples
    }

    pub(super) fn kv_secret(&self) -> &kv_secret::Kept {
        &self.kv_secret
    }

    pub(super) fn journals(&self) -> &Mutex<Journals> {
        &self.journals
    }

    /// Every member that is there, this node included, in the order of their ids.
    pub(crate) fn members_present(&self) -> Vec<NodeId> {
        let (Some(started), Some(_)) = (self.started.get(), self.state.get()) else {
            return Vec::new();
        };
        let state = self.lock();
        let all = state.present.iter().copied().chain([started.mesh.node()]);
        all.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Whether a member was declared dead a moment ago: it may have been stopped, and be there again.
    pub(super) fn misses_one(&self) -> bool {
        self.state.get().is_some() && self.lock().misses_one
    }

    /// Other members that are there and not suspected.
    pub(super) fn members_well(&self) -> Vec<NodeId> {
        let (Some(started), Some(_)) = (self.started.get(), self.state.get()) else {
            return Vec::new();
        };
        let suspected = started.members.suspected();
        let state = self.lock();
        state.present.iter().filter(|node| !suspected.contains(node)).copied().collect()
    }

    /// A node's name for people: its record's, or the beginning of its id.
    pub(crate) fn name_of(&self, node: NodeId) -> String {
        let name = self.lock().nodes.get(&node).map(|known| known.record.name.clone());
        match name.filter(|name| !name.is_empty()) {
            Some(name) => format!("{name} ({})", node.short()),
            None => node.short(),
        }
    }

    /// What its owner calls a node, if that is known.
    pub(super) fn own_name_of(&self, node: NodeId) -> Option<String> {
        let name = match self.is_own(node) {
            true => self.started.get().map(|started| started.name.clone()),
            false => self.lock().nodes.get(&node).map(|known| known.record.name.clone()),
        };
        name.filter(|name| !name.is_empty())
    }

    async fn keep(self: Arc<Self>) {
        let Some(started) = self.started.get() else { return };
        let mut refresh = tokio::time::interval(REFRESH);
        refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last_own = NodeRecord::default();
        loop {
            let next = self.lock().records.next_deadline();
            let wait = next.map_or(REFRESH, |next| next - self.now());
            let mut out = Vec::new();
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {
                    self.lock().records.handle(self.now(), RecordsInput::Timer, &mut out);
                }
                () = self.wake.notified() => {}
                _ = refresh.tick() => {
                    let (members, stats) = started.members.view().await;
                    self.lock().membership = stats;
                    self.reconcile(started.mesh.node(), &members, &mut out);
                    self.tell_overlay(started);
                    last_own = self.refresh_own(started, last_own, &mut out);
                }
            }
            for output in out {
                self.clone().act(output);
            }
        }
    }

    /// Makes the records' members those of membership.
    fn reconcile(&self, own: NodeId, members: &[MemberLine], out: &mut Vec<RecordsOutput>) {
        let here: Vec<&MemberLine> =
            members.iter().filter(|m| m.node != own && m.state.is_present()).collect();
        let present: BTreeSet<NodeId> = here.iter().map(|m| m.node).collect();
        let is_missed = |m: &MemberLine| m.state == MemberState::Dead && m.age < MISSED_FOR;
        let now = self.now();
        let mut state = self.lock();
        state.misses_one = members.iter().any(is_missed);
        state.addresses = here.iter().map(|m| (m.node, m.addresses.clone())).collect();
        let before = std::mem::replace(&mut state.present, present.clone());
        for &node in before.difference(&present) {
            state.records.handle(now, RecordsInput::Gone { node }, out);
            state.nodes.remove(&node);
            self.router().forget(node);
        }
        for &node in present.difference(&before) {
            state.records.handle(now, RecordsInput::Present { node }, out);
        }
        for member in here {
            let link = self.mesh().and_then(|mesh| mesh.link(member.node));
            if let Some(rtt) = link.map(|link| link.rtt()).or(member.rtt) {
                self.router().rtt(member.node, rtt);
            }
        }
    }

    /// Tells the overlay who may connect: the members that membership sees, unless they are revoked.
    fn tell_overlay(&self, started: &Started) {
        let (Some(reach), Some(standing)) = (&started.reach, started.mesh.standing()) else {
            return;
        };
        let revoked = standing.trust.revocations();
        let state = self.lock();
        let member = |(&node, addresses): (&NodeId, &Vec<SocketAddr>)| {
            let told = state.nodes.get(&node).map(|known| known.record.overlay.as_slice());
            let all = told.unwrap_or_default().iter().chain(addresses);
            Member { node, addresses: all.copied().map(Address::Direct).collect() }
        };
        let here = state.addresses.iter().filter(|(node, _)| !revoked.is_revoked(**node));
        let members = here.map(member).collect();
        drop(state);
        reach.set_members(members);
    }

    fn refresh_own(
        &self,
        started: &Started,
        last: NodeRecord,
        out: &mut Vec<RecordsOutput>,
    ) -> NodeRecord {
        let record = self.own_record(started);
        let states = |r: &NodeRecord| {
            let of = |m: &ReplicaRecord| (m.model.clone(), m.state);
            (r.draining, r.replicas.iter().map(of).collect::<Vec<_>>())
        };
        let urgent = states(&record) != states(&last);
        let (bytes, left_out) = record.to_bytes();
        if left_out > 0 && record.replicas.len() != last.replicas.len() {
            tracing::warn!(
                left_out,
                "more models than a node record holds: some are known only here"
            );
        }
        let input = RecordsInput::Own { record: bytes, urgent };
        self.lock().records.handle(self.now(), input, out);
        record
    }

    fn act(self: Arc<Self>, output: RecordsOutput) {
        match output {
            RecordsOutput::Exchange { with } => {
                tokio::spawn(self.exchange(with));
            }
            // Kept as they are heard and dropped as members go.
            RecordsOutput::Changed { .. } | RecordsOutput::Dropped { .. } => {}
        }
    }

    /// Tells a member this node's record and hears its own.
    async fn exchange(self: Arc<Self>, with: NodeId) {
        let Some(mesh) = self.mesh() else { return };
        let record = self.lock().records.record().to_vec();
        let call = async {
            self.connect(with).await.ok()?;
            let theirs = mesh.call(with, METHOD, record, EXCHANGE_TIMEOUT).await.ok()?;
            self.heard(with, &theirs);
            Some(())
        };
        let answered = tokio::time::timeout(EXCHANGE_TIMEOUT, call).await.ok().flatten();
        let told = answered.is_some();
        let mut state = self.lock();
        match told {
            true => state.exchanges.done += 1,
            false => state.exchanges.failed += 1,
        }
        let done = RecordsInput::Done { node: with, told };
        state.records.handle(self.now(), done, &mut Vec::new());
    }

    /// A member's record has come.
    fn heard(&self, node: NodeId, bytes: &[u8]) {
        let record = match NodeRecord::from_bytes(bytes) {
            Ok(record) => record,
            Err(error) => {
                tracing::debug!(node = %node.short(), %error, "a node record is refused");
                return;
            }
        };
        let now = self.now();
        let mut state = self.lock();
        if !state.present.contains(&node) {
            return;
        }
        let mut router = self.router();
        router.report(now, node, loads(&record));
        router.path(node, true);
        let several = |r: &ReplicaRecord| router.weights(&r.model).is_some_and(|(_, many)| many);
        let several = record.replicas.iter().map(several).collect();
        drop(router);
        state.warn_of_other_weights(&record, several);
        let input = RecordsInput::Heard { node, record: bytes.to_vec() };
        state.records.handle(now, input, &mut Vec::new());
        state.nodes.insert(node, Known { record, heard: now });
    }

    fn own_record(&self, started: &Started) -> NodeRecord {
        let measured = started.app.measured.get().copied().unwrap_or_default();
        NodeRecord {
            name: started.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            overlay: started.reach.as_ref().map_or_else(Vec::new, |reach| reach.external()),
            api: apis::told(started.app.listen, &started.mesh.contact().addresses),
            memory_bytes_per_s: measured.memory_bytes_per_s,
            int8_ops_per_s: measured.int8_ops_per_s,
            draining: started.app.drain.is_cancelled(),
            role: started.app.role,
            replicas: started.app.registry.replica_records(),
        }
    }

    pub(super) fn now(&self) -> Instant {
        Instant::ORIGIN + self.origin.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        let state = self.state.get().expect("set before anything that locks is reached");
        state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn router(&self) -> MutexGuard<'_, Router> {
        let router = self.router.get().expect("set before anything that locks is reached");
        router.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Service for Roster {
    fn datagram(&self, from: NodeId, bytes: Bytes) {
        if let Some(started) = self.started.get() {
            started.members.datagram(from, bytes);
        }
    }

    fn event(&self, event: PeerEvent) {
        let Some(started) = self.started.get() else { return };
        match event {
            PeerEvent::Connected { node, .. } => self.router().path(node, true),
            PeerEvent::Path { node, carried } => started.members.path(node, carried),
            PeerEvent::Disconnected { node } => {
                self.router().path(node, false);
                started.members.check(node);
            }
        }
    }

    fn kv_control(&self, from: NodeId, ask: Frame, stream: FrameStream) {
        if let Some(started) = self.started.get() {
            let kv = started.app.kv.clone();
            tokio::spawn(async move { kv.asked(from, ask, stream).await });
        }
    }

    fn kv_data(&self, from: NodeId, header: Frame, stream: DataStream) {
        if let Some(started) = self.started.get() {
            let kv = started.app.kv.clone();
            tokio::spawn(async move { kv.data(from, header, stream).await });
        }
    }

    fn call(&self, call: Call) -> Result<BoxFuture<'static, ()>, Box<Call>> {
        if call.request.method == KV_SECRET {
            return Ok(Box::pin(kv_secret::answer(self.kv_secret.get().copied(), call)));
        }
        let Some(started) = self.started.get() else { return Err(call.into()) };
        match call.request.method.as_str() {
            METHOD => {
                self.heard(call.from, &call.request.body);
                let own = self.lock().records.record().to_vec();
                Ok(Box::pin(async move {
                    // The caller may be gone; it asks again.
                    let _ = call.stream.reply(own).await;
                }))
            }
            REPORT | QUERY => {
                let kv = started.app.kv.clone();
                Ok(Box::pin(async move { kv.directory_call(call).await }))
            }
            KEEP | FETCH => match self.me.upgrade() {
                Some(roster) => Ok(Box::pin(roster.answer_copies(call))),
                None => Err(call.into()),
            },
            protocol::forward::METHOD => Ok(Box::pin(answer::answer(started.app.clone(), call))),
            _ => Err(call.into()),
        }
    }
}

fn loads(record: &NodeRecord) -> Vec<(String, ReplicaLoad)> {
    let load = |replica: &ReplicaRecord| ReplicaLoad {
        ready: replica.state == ReplicaState::Ready && !record.draining,
        running: replica.running,
        waiting: replica.waiting,
        prompt_tokens: replica.prompt_tokens,
        prefill_rate: replica.prefill_rate,
        weights: first_bytes(&replica.fingerprint),
        decode_step_us: replica.decode_step_us,
        kv_bytes_per_token: replica.kv_bytes_per_token,
        below_ns_per_token: replica.below_ns_per_token.unwrap_or(0),
        kv_blocks_free: replica.kv_blocks_free,
        kv_blocks: replica.kv_blocks,
        role: record.role,
    };
    record.replicas.iter().map(|r| (r.model.clone(), load(r))).collect()
}

/// Names a fingerprint in the router.
fn first_bytes(fingerprint: &str) -> u64 {
    let hash = blake3::hash(fingerprint.as_bytes());
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"))
}

/// The host's name, for people.
pub(super) fn host_name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.unwrap_or_default()
}

/// The method by which two members give each other their records: one's is the body, the other's the
/// reply.
const METHOD: &str = "record";
/// How often this node looks at itself and at who is there.
const REFRESH: Duration = Duration::from_millis(250);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a member that was declared dead may still come back with what it had in memory.
const MISSED_FOR: Duration = Duration::from_secs(10);
/// Time for a member's own addresses before others are asked to carry. Too small: nodes on slow paths are
/// carried for nothing. Too large: exchanges of records, which have two seconds, never come to it.
const CARRIED_AFTER: Duration = Duration::from_secs(1);
/// Several members may be asked to carry.
const CONNECT_CARRIED_TIMEOUT: Duration = Duration::from_secs(6);
/// As [`RecordsConfig::exchange_timeout`].
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(2);
