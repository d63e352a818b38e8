//! What the overlay knows of the members, and what it owes each of them. Pure: time is an argument.
//!
//! Owns addresses, connections, the pauses between dials, budgets and penalties. Nobody but a member has
//! an entry, so that strangers cost nothing here.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use libp2p::swarm::ConnectionId;
use protocol::{Instant, NodeId};

use super::address::Address;
use super::limits::{
    ADDRESSES_PER_NODE_MAX, BURST_SECONDS, DIALS_PER_TICK, IDENTIFIES_PER_SECOND, Limits,
    MEMBERS_MAX, PENALTY, REDIAL_MAX, REDIAL_MIN, RELAYED_LINGER,
};
use super::{CutOff, Member, Path, PeerPath};

/// The members, by id.
pub(super) struct Peers {
    own: NodeId,
    limits: Limits,
    members: BTreeMap<NodeId, Peer>,
}

struct Peer {
    /// What it says itself, and what membership says; heard of last comes first.
    addresses: Vec<Address>,
    /// What others say of it. Kept apart, so that a lie cannot push the truth out.
    hearsay: Vec<Address>,
    /// Whom we prefer to be connected with: random, but always the same for us.
    order: u64,
    connections: Vec<Connection>,
    /// Whether it offers to pass connections on.
    relay: bool,
    away_until: Option<Instant>,
    dialling: bool,
    /// Dial even if enough others are connected.
    wanted: bool,
    failures: u32,
    next_dial: Instant,
    messages: Bucket,
    forwards: Bucket,
    identifies: Bucket,
}

struct Connection {
    id: ConnectionId,
    path: Path,
    since: Instant,
    remote: Option<SocketAddr>,
    dialled: bool,
}

/// What a new list of members changes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    pub added: Vec<NodeId>,
    /// With whether they were connected.
    pub removed: Vec<(NodeId, bool)>,
    /// Members beyond [`MEMBERS_MAX`].
    pub ignored: usize,
}

/// What is to be done with a broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Take,
    /// Not delivered and not passed on; nobody is to blame, or nobody we can reach.
    Ignore(Ignored),
    /// Neither, and whoever passed it to us is cut off.
    CutOff(CutOff),
}

/// Why a broadcast was ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ignored {
    Stranger,
    Rate,
}

impl Peers {
    pub(super) fn new(own: NodeId, limits: Limits) -> Peers {
        Peers { own, limits, members: BTreeMap::new() }
    }

    /// Takes over who is a member. Known members keep what is known of them.
    pub(super) fn set_members(&mut self, now: Instant, members: &[Member]) -> Changes {
        let mut changes = Changes::default();
        let mut listed: BTreeMap<NodeId, &[Address]> = BTreeMap::new();
        for member in members.iter().filter(|m| m.node != self.own) {
            if listed.len() < MEMBERS_MAX || listed.contains_key(&member.node) {
                listed.insert(member.node, &member.addresses);
            } else {
                changes.ignored += 1;
            }
        }
        let gone = self.members.iter().filter(|(node, _)| !listed.contains_key(node));
        changes.removed = gone.map(|(&node, peer)| (node, peer.path().is_some())).collect();
        for (node, _) in &changes.removed {
            self.members.remove(node);
        }
        for (node, addresses) in listed {
            if !self.members.contains_key(&node) {
                changes.added.push(node);
                let order = preference(self.own, node);
                self.members.insert(node, Peer::new(now, order, &self.limits));
            }
            self.learn(node, addresses);
        }
        changes
    }

    /// True if `node` may be connected: a member that did not misbehave lately.
    pub(super) fn is_admitted(&self, node: NodeId) -> bool {
        self.members.get(&node).is_some_and(|peer| peer.away_until.is_none())
    }

    pub(super) fn is_member(&self, node: NodeId) -> bool {
        self.members.contains_key(&node)
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Remembers addresses that a member, or membership, gives for itself; true if one was new.
    pub(super) fn learn(&mut self, node: NodeId, addresses: &[Address]) -> bool {
        let Some(peer) = self.members.get_mut(&node) else { return false };
        let new = remember(&mut peer.addresses, node, addresses);
        peer.begin_anew_if(new);
        new
    }

    /// Remembers addresses that somebody else gives for a member; true if one was new.
    pub(super) fn hear(&mut self, node: NodeId, addresses: &[Address]) -> bool {
        let Some(peer) = self.members.get_mut(&node) else { return false };
        let unknown: Vec<Address> =
            addresses.iter().filter(|a| !peer.addresses.contains(a)).copied().collect();
        let new = remember(&mut peer.hearsay, node, &unknown);
        peer.begin_anew_if(new);
        new
    }

    /// Forgets an address at which somebody else answered.
    pub(super) fn unlearn(&mut self, node: NodeId, address: &Address) {
        if let Some(peer) = self.members.get_mut(&node) {
            peer.addresses.retain(|known| known != address);
            peer.hearsay.retain(|known| known != address);
        }
    }

    /// What a member says of itself: also that we are its relay, which others want to know.
    pub(super) fn addresses(&self, node: NodeId) -> &[Address] {
        self.members.get(&node).map_or(&[], |peer| &peer.addresses)
    }

    pub(super) fn set_relay(&mut self, node: NodeId, relay: bool) {
        if let Some(peer) = self.members.get_mut(&node) {
            peer.relay = relay;
        }
    }

    /// A connection came up. `Some` if the best path to the node is another now.
    pub(super) fn connected(
        &mut self,
        now: Instant,
        node: NodeId,
        id: ConnectionId,
        path: Path,
        remote: Option<SocketAddr>,
        dialled: bool,
    ) -> Option<Path> {
        let peer = self.members.get_mut(&node)?;
        let before = peer.path();
        peer.connections.push(Connection { id, path, since: now, remote, dialled });
        peer.dialling = false;
        peer.wanted = false;
        peer.failures = 0;
        let path = peer.path();
        if path == before { None } else { path }
    }

    /// A connection ended. `Some` if the best path is another now: `Some(None)` if there is none.
    pub(super) fn closed(
        &mut self,
        now: Instant,
        node: NodeId,
        id: ConnectionId,
    ) -> Option<Option<Path>> {
        let peer = self.members.get_mut(&node)?;
        let before = peer.path();
        peer.connections.retain(|connection| connection.id != id);
        // A member that came back while its old connection was being closed is not dialled meanwhile.
        peer.dialling = false;
        peer.next_dial = now + REDIAL_MIN;
        let path = peer.path();
        (path != before).then_some(path)
    }

    pub(super) fn path(&self, node: NodeId) -> Option<Path> {
        self.members.get(&node)?.path()
    }

    /// The host at the other end of a connection, if it is not relayed.
    pub(super) fn remote(&self, node: NodeId, id: ConnectionId) -> Option<IpAddr> {
        let peer = self.members.get(&node)?;
        let connection = peer.connections.iter().find(|c| c.id == id)?;
        connection.remote.map(|at| at.ip())
    }

    /// Where a directly connected member is.
    pub(super) fn direct(&self, node: NodeId) -> Option<SocketAddr> {
        self.members.get(&node)?.direct()
    }

    /// Connected members with their paths.
    pub(super) fn paths(&self) -> impl Iterator<Item = PeerPath> + '_ {
        let path = |(&node, peer): (&NodeId, &Peer)| {
            Some(PeerPath { node, path: peer.path()?, at: peer.direct() })
        };
        self.members.iter().filter_map(path)
    }

    /// Whether more members should be connected than are.
    pub(super) fn is_lonely(&self) -> bool {
        let connected = self.members.values().filter(|p| !p.connections.is_empty()).count();
        connected < self.limits.peers_wanted.min(self.members.len())
    }

    /// Asks for a connection, whatever happened before.
    pub(super) fn want(&mut self, now: Instant, node: NodeId) -> bool {
        let Some(peer) = self.members.get_mut(&node) else { return false };
        peer.wanted = peer.connections.is_empty();
        peer.next_dial = now;
        true
    }

    /// Whom to dial now, and where; each counts as being dialled until it is connected or
    /// [`Peers::dial_failed`] says otherwise.
    pub(super) fn dials(&mut self, now: Instant) -> Vec<(NodeId, Vec<Address>)> {
        let busy =
            self.members.values().filter(|p| p.dialling || !p.connections.is_empty()).count();
        let missing = self.limits.peers_wanted.saturating_sub(busy);
        if missing == 0 && !self.members.values().any(|peer| peer.wanted) {
            return Vec::new();
        }
        let own = self.own;
        let mut due: Vec<(&NodeId, &mut Peer)> =
            self.members.iter_mut().filter(|(_, peer)| peer.is_due(now, own)).collect();
        due.sort_by_key(|(_, peer)| (!peer.wanted, peer.failures, peer.order));
        let wanted = due.iter().filter(|(_, peer)| peer.wanted).count();
        due.into_iter()
            .take(missing.max(wanted).min(DIALS_PER_TICK))
            .map(|(&node, peer)| {
                peer.dialling = true;
                (node, peer.addresses_from(own))
            })
            .collect()
    }

    /// A dial came to nothing: the next one waits longer.
    pub(super) fn dial_failed(&mut self, now: Instant, node: NodeId) {
        let Some(peer) = self.members.get_mut(&node) else { return };
        peer.dialling = false;
        peer.wanted = false;
        peer.failures = peer.failures.saturating_add(1);
        let pause = REDIAL_MIN * 2u32.saturating_pow(peer.failures.min(16) - 1);
        peer.next_dial = now + pause.min(REDIAL_MAX);
    }

    /// Charges a description that a peer sent of itself; false if it sends too many.
    pub(super) fn identified(&mut self, now: Instant, node: NodeId) -> bool {
        self.members.get_mut(&node).is_some_and(|peer| peer.identifies.take(now))
    }

    /// Charges a broadcast of `source` that `forwarder` passed to us.
    pub(super) fn judge(
        &mut self,
        now: Instant,
        source: NodeId,
        forwarder: NodeId,
        bytes: usize,
    ) -> Verdict {
        if bytes > self.limits.message_bytes {
            return Verdict::CutOff(CutOff::Oversized);
        }
        if !self.is_admitted(source) || !self.is_admitted(forwarder) {
            return Verdict::Ignore(Ignored::Stranger);
        }
        let charge = |peer: Option<&mut Peer>, of: fn(&mut Peer) -> &mut Bucket| {
            peer.is_some_and(|peer| of(peer).take(now))
        };
        if !charge(self.members.get_mut(&source), |peer| &mut peer.messages) {
            return match source == forwarder {
                true => Verdict::CutOff(CutOff::Rate),
                false => Verdict::Ignore(Ignored::Rate),
            };
        }
        match charge(self.members.get_mut(&forwarder), |peer| &mut peer.forwards) {
            true => Verdict::Take,
            false => Verdict::Ignore(Ignored::Rate),
        }
    }

    /// Sends a member away for [`PENALTY`]; false if it is none, or away already.
    pub(super) fn misbehaved(&mut self, now: Instant, node: NodeId) -> bool {
        let Some(peer) = self.members.get_mut(&node) else { return false };
        let here = peer.away_until.is_none();
        peer.away_until = Some(now + PENALTY);
        here
    }

    /// Members whose penalty is over; each is named once.
    pub(super) fn pardoned(&mut self, now: Instant) -> Vec<NodeId> {
        let over = |peer: &Peer| peer.away_until.is_some_and(|until| until <= now);
        let pardoned = self.members.iter_mut().filter(|(_, peer)| over(peer));
        pardoned
            .map(|(&node, peer)| {
                peer.away_until = None;
                node
            })
            .collect()
    }

    /// Relayed connections that a direct one has replaced.
    pub(super) fn replaced(&self, now: Instant) -> Vec<ConnectionId> {
        let direct = self.members.values().filter(|peer| {
            let settled = |c: &Connection| {
                c.path == Path::Direct && now.saturating_since(c.since) >= RELAYED_LINGER
            };
            peer.connections.iter().any(settled)
        });
        direct
            .flat_map(|peer| &peer.connections)
            .filter(|c| c.path == Path::Relayed)
            .map(|c| c.id)
            .collect()
    }

    /// Nodes that may serve us as relays, and where others can reach them, best first.
    pub(super) fn relays(&self) -> Vec<(NodeId, SocketAddr)> {
        let offers =
            self.members.iter().filter(|(_, peer)| peer.relay && peer.away_until.is_none());
        let mut relays: Vec<(u64, NodeId, SocketAddr)> =
            offers.filter_map(|(&node, peer)| Some((peer.order, node, peer.as_relay()?))).collect();
        relays.sort();
        relays.into_iter().map(|(_, node, at)| (node, at)).collect()
    }
}

impl Peer {
    fn new(now: Instant, order: u64, limits: &Limits) -> Peer {
        Peer {
            addresses: Vec::new(),
            hearsay: Vec::new(),
            order,
            connections: Vec::new(),
            relay: false,
            away_until: None,
            dialling: false,
            wanted: false,
            failures: 0,
            next_dial: now,
            messages: Bucket::new(now, limits.messages_per_second),
            forwards: Bucket::new(now, limits.forwards_per_second),
            identifies: Bucket::new(now, IDENTIFIES_PER_SECOND),
        }
    }

    /// What failed before may work at a new address.
    fn begin_anew_if(&mut self, new: bool) {
        if new && self.connections.is_empty() {
            self.failures = 0;
        }
    }

    fn path(&self) -> Option<Path> {
        self.connections.iter().map(|c| c.path).min()
    }

    fn direct(&self) -> Option<SocketAddr> {
        self.connections.iter().filter(|c| c.path == Path::Direct).find_map(|c| c.remote)
    }

    /// Where `own` can dial it. A node whose relay we are cannot be reached through ourselves.
    fn addresses_from(&self, own: NodeId) -> Vec<Address> {
        let all = self.addresses.iter().chain(&self.hearsay);
        all.filter(|address| address.relay() != Some(own)).copied().collect()
    }

    fn is_due(&self, now: Instant, own: NodeId) -> bool {
        self.connections.is_empty()
            && !self.dialling
            && self.away_until.is_none()
            && self.next_dial <= now
            && !self.addresses_from(own).is_empty()
    }

    /// Where others can reach this node when it is their relay: an address of the open internet if it
    /// has one, else the one that we reached it at.
    fn as_relay(&self) -> Option<SocketAddr> {
        let direct = self.connections.iter().filter(|c| c.path == Path::Direct);
        let reached = direct.clone().find(|c| c.dialled).and_then(|c| c.remote);
        direct.clone().next()?;
        let told = self.addresses.iter().filter(|a| !a.is_relayed()).map(Address::socket);
        told.clone().find(|at| is_global(at.ip())).or(reached).or(told.clone().next())
    }
}

/// Puts addresses in front, in their order, and forgets what is beyond the bound; true if one was new.
fn remember(known: &mut Vec<Address>, node: NodeId, addresses: &[Address]) -> bool {
    let mut new = false;
    for &address in addresses.iter().take(ADDRESSES_PER_NODE_MAX).rev() {
        // A circuit through the node itself leads nowhere.
        if address.relay() == Some(node) {
            continue;
        }
        let before = known.len();
        known.retain(|other| *other != address);
        new |= known.len() == before;
        known.insert(0, address);
    }
    known.truncate(ADDRESSES_PER_NODE_MAX);
    new
}

/// A budget that fills at a rate, up to [`BURST_SECONDS`] of it.
pub(super) struct Bucket {
    per_second: u32,
    /// In nanoseconds of filling time.
    full: Duration,
    at: Instant,
}

impl Bucket {
    pub(super) fn new(now: Instant, per_second: u32) -> Bucket {
        Bucket { per_second: per_second.max(1), full: Bucket::depth(), at: now }
    }

    const fn depth() -> Duration {
        Duration::from_secs(BURST_SECONDS as u64)
    }

    /// Takes one, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let cost = Duration::from_secs(1) / self.per_second;
        self.full = (self.full + now.saturating_since(self.at)).min(Bucket::depth());
        self.at = now;
        match self.full.checked_sub(cost) {
            Some(rest) => {
                self.full = rest;
                true
            }
            None => false,
        }
    }
}

/// Each node prefers others at random, so that the connections of all form a random graph, which hangs
/// together with a few per node.
fn preference(own: NodeId, other: NodeId) -> u64 {
    let hash = blake3::hash(&[own.0, other.0].concat());
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"))
}

/// Whether an address belongs to the open internet, as far as its range tells.
pub(super) fn is_global(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_documentation()
                || ip.is_unspecified()
                || ip.is_multicast()
                || shared)
        }
        // Global unicast is 2000::/3.
        IpAddr::V6(ip) => ip.octets()[0] & 0xe0 == 0x20,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn node(n: u8) -> NodeId {
        NodeId([n; 32])
    }

    fn at(n: u8) -> Address {
        Address::Direct(SocketAddr::from(([192, 0, 2, n], 8421)))
    }

    fn member(n: u8) -> Member {
        Member { node: node(n), addresses: vec![at(n)] }
    }

    fn peers(others: impl IntoIterator<Item = u8>) -> Peers {
        let mut peers = Peers::new(node(0), Limits { peers_wanted: 3, ..Limits::default() });
        let members: Vec<Member> = others.into_iter().map(member).collect();
        peers.set_members(Instant::ORIGIN, &members);
        peers
    }

    fn connect(peers: &mut Peers, n: u8, id: usize, path: Path) -> Option<Path> {
        let id = ConnectionId::new_unchecked(id);
        let remote = Some(at(n).socket());
        peers.connected(Instant::ORIGIN, node(n), id, path, remote, true)
    }

    #[test]
    fn members_come_and_go() {
        let mut peers = peers([1, 2]);
        connect(&mut peers, 1, 1, Path::Direct);
        let changes = peers.set_members(Instant::ORIGIN, &[member(0), member(2), member(3)]);
        let expect = Changes { added: vec![node(3)], removed: vec![(node(1), true)], ignored: 0 };
        assert_eq!(changes, expect, "we are no peer of ourselves");
        assert!(!peers.is_admitted(node(1)) && peers.is_admitted(node(2)));
        assert!(!peers.learn(node(1), &[at(9)]), "nothing is kept of strangers");
    }

    #[test]
    fn members_are_bounded() {
        let many: Vec<Member> = (0..MEMBERS_MAX + 5)
            .map(|i| {
                let id =
                    std::array::from_fn(|at| if at < 8 { ((i + 1) >> (8 * at)) as u8 } else { 7 });
                Member { node: NodeId(id), addresses: Vec::new() }
            })
            .collect();
        let mut peers = Peers::new(node(0), Limits::default());
        let changes = peers.set_members(Instant::ORIGIN, &many);
        assert_eq!((changes.added.len(), changes.ignored), (MEMBERS_MAX, 5));
        assert_eq!(peers.len(), MEMBERS_MAX);
    }

    #[test]
    fn addresses_are_bounded_and_the_newest_first() {
        let mut peers = peers([1]);
        for n in 0..100 {
            assert!(peers.learn(node(1), &[at(n)]) || n == 1);
        }
        assert!(!peers.learn(node(1), &[at(90)]), "known");
        assert_eq!(peers.addresses(node(1))[..2], [at(90), at(99)]);
        assert_eq!(peers.addresses(node(1)).len(), ADDRESSES_PER_NODE_MAX);
        let through = |n| Address::Relayed { relay: node(n), at: at(n).socket() };
        assert!(!peers.learn(node(1), &[through(1)]), "a circuit through the node itself");
        assert!(peers.learn(node(1), &[through(0)]), "others want to know whose relay we are");
        assert_eq!(peers.addresses(node(1))[0], through(0));
        assert!(!peers.dials(Instant::ORIGIN)[0].1.contains(&through(0)));
    }

    #[test]
    fn what_others_say_cannot_displace_what_a_node_says() {
        let mut peers = peers([1]);
        for n in 0..100 {
            assert_eq!(peers.hear(node(1), &[at(n)]), n != 1);
        }
        assert_eq!(peers.addresses(node(1)), [at(1)]);
        let (_, addresses) = peers.dials(Instant::ORIGIN).remove(0);
        assert_eq!(addresses[..2], [at(1), at(99)]);
        assert_eq!(addresses.len(), 1 + ADDRESSES_PER_NODE_MAX);
        peers.unlearn(node(1), &at(99));
        peers.dial_failed(Instant::ORIGIN, node(1));
        let (_, addresses) = peers.dials(Instant::ORIGIN + SECOND).remove(0);
        assert_eq!(addresses[..2], [at(1), at(98)]);
    }

    #[test]
    fn dials_until_enough_are_connected() {
        let mut peers = peers(1..=9);
        let now = Instant::ORIGIN;
        let first: Vec<NodeId> = peers.dials(now).into_iter().map(|(node, _)| node).collect();
        assert_eq!(first.len(), 3);
        assert_eq!(peers.dials(now), vec![], "they are being dialled");
        peers.dial_failed(now, first[0]);
        let second = peers.dials(now);
        assert_eq!(second.len(), 1);
        assert_ne!(second[0].0, first[0], "it waits for its turn");
        assert!(peers.want(now, first[0]));
        assert_eq!(peers.dials(now), vec![(first[0], peers.addresses(first[0]).to_vec())]);
    }

    #[test]
    fn pauses_between_dials_grow_to_a_bound() {
        let mut peers = peers([1]);
        let mut now = Instant::ORIGIN;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let began = now;
            while peers.dials(now).is_empty() {
                now = now + SECOND;
            }
            pauses.push((now - began).as_secs());
            peers.dial_failed(now, node(1));
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        peers.learn(node(1), &[at(7)]);
        peers.dial_failed(now, node(1));
        assert_eq!(peers.dials(now + SECOND).len(), 1, "a new address begins anew");
    }

    #[test]
    fn the_best_path_is_told_when_it_changes() {
        let mut peers = peers([1]);
        assert_eq!(connect(&mut peers, 1, 1, Path::Relayed), Some(Path::Relayed));
        assert_eq!(connect(&mut peers, 1, 2, Path::Relayed), None);
        assert_eq!(peers.replaced(Instant::ORIGIN + RELAYED_LINGER), vec![]);
        assert_eq!(connect(&mut peers, 1, 3, Path::Direct), Some(Path::Direct));
        assert_eq!(peers.replaced(Instant::ORIGIN), vec![], "the other end may not know yet");
        let old = [1, 2].map(ConnectionId::new_unchecked);
        assert_eq!(peers.replaced(Instant::ORIGIN + RELAYED_LINGER), old);
        let now = Instant::ORIGIN;
        assert_eq!(peers.closed(now, node(1), old[0]), None);
        let direct = ConnectionId::new_unchecked(3);
        assert_eq!(peers.closed(now, node(1), direct), Some(Some(Path::Relayed)));
        assert_eq!(peers.closed(now, node(1), old[1]), Some(None));
        assert_eq!(connect(&mut peers, 9, 4, Path::Direct), None, "no member");
    }

    #[test]
    fn broadcasts_are_judged() {
        let mut peers = peers([1, 2]);
        let now = Instant::ORIGIN;
        let limits = Limits::default();
        let size = limits.message_bytes;
        assert_eq!(peers.judge(now, node(1), node(2), size), Verdict::Take);
        let oversized = Verdict::CutOff(CutOff::Oversized);
        assert_eq!(peers.judge(now, node(1), node(2), size + 1), oversized);
        let stranger = Verdict::Ignore(Ignored::Stranger);
        assert_eq!(peers.judge(now, node(9), node(2), size), stranger);
        for _ in 1..limits.messages_per_second * BURST_SECONDS {
            assert_eq!(peers.judge(now, node(1), node(2), size), Verdict::Take);
        }
        let rate = Verdict::Ignore(Ignored::Rate);
        assert_eq!(peers.judge(now, node(1), node(2), size), rate, "not the forwarder's fault");
        let cut = Verdict::CutOff(CutOff::Rate);
        assert_eq!(peers.judge(now, node(1), node(1), size), cut);
        assert_eq!(peers.judge(now + SECOND, node(1), node(1), size), Verdict::Take);
    }

    #[test]
    fn penalties_end() {
        let mut peers = peers([1]);
        let now = Instant::ORIGIN;
        assert!(peers.misbehaved(now, node(1)));
        assert!(!peers.misbehaved(now, node(1)), "away already");
        assert!(!peers.misbehaved(now, node(9)), "no member");
        assert!(!peers.is_admitted(node(1)));
        assert_eq!(peers.dials(now), vec![]);
        assert_eq!(peers.pardoned(now), vec![]);
        assert_eq!(peers.pardoned(now + PENALTY), vec![node(1)]);
        assert_eq!(peers.pardoned(now + PENALTY), vec![]);
        assert!(peers.is_admitted(node(1)));
    }

    #[test]
    fn relays_are_named_by_an_address_that_others_can_reach() {
        let mut peers = peers([1, 2]);
        connect(&mut peers, 1, 1, Path::Direct);
        assert_eq!(peers.relays(), vec![], "it does not offer");
        peers.set_relay(node(1), true);
        peers.set_relay(node(2), true);
        assert_eq!(peers.relays(), vec![(node(1), at(1).socket())], "the other is not connected");
        let global: SocketAddr = "9.9.9.9:8421".parse().unwrap();
        peers.learn(node(1), &[Address::Direct(global)]);
        peers.learn(node(1), &["10.0.0.1:8421".parse().unwrap()]);
        assert_eq!(peers.relays(), vec![(node(1), global)]);
        peers.misbehaved(Instant::ORIGIN, node(1));
        assert_eq!(peers.relays(), vec![]);
    }

    #[test]
    fn buckets() {
        let mut bucket = Bucket::new(Instant::ORIGIN, 4);
        let taken = |bucket: &mut Bucket, now| (0..1000).take_while(|_| bucket.take(now)).count();
        assert_eq!(taken(&mut bucket, Instant::ORIGIN), 32);
        assert_eq!(taken(&mut bucket, Instant::ORIGIN + SECOND), 4);
        assert_eq!(taken(&mut bucket, Instant::ORIGIN + SECOND * 1000), 32);
    }
}
