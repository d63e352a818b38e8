//! Ways over a carrier ([`protocol::carry`]), as the socket under QUIC sees them.
//!
//! A node that is reached over another one has an address of its own here, one for each carrier, from a
//! block that no network uses (240.0.0.0/4, RFC 1112) and that means something in this process only. Whatever
//! QUIC sends there leaves in datagrams on the connection with the carrier, and what comes from there is
//! received from that address. So a connection over a carrier is one like any other: TLS, greeting, calls, KV
//! blocks. And a member that claims to carry for somebody changes no way but its own.
//!
//! Owns: which address is which node's, over whom it is reached, and what is on its way between the socket
//! and the connections. Refuses: who carries ([`super::carrier`]), and reliability: what finds no
//! room is dropped, as on any network.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use protocol::NodeId;
use protocol::carry::{Parcel, Pieces};
use tokio::sync::mpsc;

/// See the module.
#[derive(Debug)]
pub(super) struct Carried {
    /// Addresses are shown to QUIC as those of its socket.
    is_ipv6: bool,
    table: Mutex<Table>,
    leaving: mpsc::Sender<Leaving>,
}

/// A packet that is to leave by a carrier.
#[derive(Debug)]
pub(super) struct Leaving {
    pub carrier: NodeId,
    pub to: NodeId,
    pub number: u8,
    pub packet: Vec<u8>,
}

#[derive(Debug, Default)]
struct Table {
    ways: BTreeMap<Ends, Way>,
    ends: BTreeMap<u32, Ends>,
    /// Of the last address.
    last: u32,
    arrived: VecDeque<(SocketAddr, Vec<u8>)>,
    /// Who waits for what arrives.
    receiver: Option<Waker>,
}

/// Which node, and over whom.
type Ends = (NodeId, NodeId);

#[derive(Debug)]
struct Way {
    number: u32,
    used: Instant,
    pieces: Pieces,
    /// Packets sent.
    sent: u8,
}

impl Carried {
    /// What is to leave comes out of the receiver.
    pub fn new(is_ipv6: bool) -> (Carried, mpsc::Receiver<Leaving>) {
        let (leaving, receiver) = mpsc::channel(LEAVING_MAX);
        (Carried { is_ipv6, table: Mutex::default(), leaving }, receiver)
    }

    /// The address of a node that is reached over `carrier`.
    pub fn way(&self, node: NodeId, carrier: NodeId) -> SocketAddr {
        address(self.lock().way((node, carrier)).number, false)
    }

    /// Over whom an address is reached.
    pub fn carrier(&self, address: SocketAddr) -> Option<NodeId> {
        let (_, carrier) = *self.lock().ends.get(&number(address)?)?;
        Some(carrier)
    }

    /// Takes a packet that QUIC sends to one of these addresses.
    pub fn send(&self, to: SocketAddr, packet: &[u8]) {
        let mut table = self.lock();
        let ends = number(to).and_then(|number| table.ends.get(&number).copied());
        let Some((to, carrier)) = ends else { return };
        let Some(way) = table.ways.get_mut(&(to, carrier)) else { return };
        way.used = Instant::now();
        way.sent = way.sent.wrapping_add(1) & NUMBER_MAX;
        let number = way.sent;
        drop(table);
        let packet = packet.to_vec();
        let _ = self.leaving.try_send(Leaving { carrier, to, number, packet });
    }

    /// Takes what a carrier says comes from a node.
    pub fn arrived(&self, carrier: NodeId, parcel: &Parcel<'_>) {
        let mut table = self.lock();
        let way = table.way((parcel.node, carrier));
        way.used = Instant::now();
        let number = way.number;
        let Some(packet) = way.pieces.take(parcel) else { return };
        if table.arrived.len() < ARRIVED_MAX {
            table.arrived.push_back((address(number, self.is_ipv6), packet));
        }
        let receiver = table.receiver.take();
        drop(table);
        if let Some(receiver) = receiver {
            receiver.wake();
        }
    }

    /// The next packet that has arrived, and from where.
    pub fn poll(&self, context: &mut Context<'_>) -> Poll<(SocketAddr, Vec<u8>)> {
        let mut table = self.lock();
        match table.arrived.pop_front() {
            Some(packet) => Poll::Ready(packet),
            None => {
                if !table.receiver.as_ref().is_some_and(|known| known.will_wake(context.waker())) {
                    table.receiver = Some(context.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// A way, made if there is none; the one that was not used for longest makes room.
    fn way(&mut self, ends: Ends) -> &mut Way {
        if !self.ways.contains_key(&ends) {
            let oldest = self.ways.iter().min_by_key(|(_, way)| way.used);
            if self.ways.len() >= WAYS_MAX
                && let Some((&oldest, way)) = oldest
            {
                self.ends.remove(&way.number);
                self.ways.remove(&oldest);
            }
            // An address is not used again before all others were.
            self.last = (self.last + 1) % NUMBERS;
            self.ends.insert(self.last, ends);
        }
        let number = self.last;
        self.ways.entry(ends).or_insert_with(|| Way {
            number,
            used: Instant::now(),
            pieces: Pieces::default(),
            sent: 0,
        })
    }
}

/// Whether an address is that of a way over a carrier.
pub(super) fn is_carried(address: SocketAddr) -> bool {
    number(address).is_some()
}

fn number(address: SocketAddr) -> Option<u32> {
    let IpAddr::V4(ip) = address.ip().to_canonical() else { return None };
    let bits = u32::from(ip);
    (bits >= FIRST && !ip.is_broadcast()).then(|| bits - FIRST)
}

fn address(number: u32, is_ipv6: bool) -> SocketAddr {
    let ip = Ipv4Addr::from(FIRST + number);
    match is_ipv6 {
        true => (ip.to_ipv6_mapped(), PORT).into(),
        false => (ip, PORT).into(),
    }
}

/// 240.0.0.0, and how many follow that are used.
const FIRST: u32 = 0xF000_0000;
const NUMBERS: u32 = 1 << 27;
/// Of no meaning; QUIC takes no port 0.
const PORT: u16 = 1;
/// Ways to nodes over carriers. Too small: connections break. Too large: memory for members who make
/// others carry nonsense.
const WAYS_MAX: usize = 256;
/// Packets on their way out and in; more are dropped. Too small: bursts are lost. Too large: they wait.
const LEAVING_MAX: usize = 256;
const ARRIVED_MAX: usize = 256;
/// Packets are numbered with six bits.
const NUMBER_MAX: u8 = 63;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use protocol::carry::{Piece, Way as Direction};

    use super::*;

    const A: NodeId = NodeId([1; 32]);
    const B: NodeId = NodeId([2; 32]);
    const R: NodeId = NodeId([3; 32]);

    fn from(node: NodeId, piece: Piece, bytes: &[u8]) -> Parcel<'_> {
        Parcel { way: Direction::From, node, number: 7, piece, bytes }
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn each_way_has_its_address() {
        let (carried, mut leaving) = Carried::new(false);
        let at = carried.way(A, R);
        assert!(is_carried(at));
        assert_eq!(carried.way(A, R), at, "a way keeps its address");
        assert_ne!(carried.way(B, R), at);
        carried.send(at, b"one");
        // Another member claims that A's packets come over it: that is another way.
        carried.arrived(B, &from(A, Piece::Whole, b"answer"));
        carried.send(at, b"two");
        let other = carried.way(A, B);
        assert_ne!(other, at);
        carried.send(other, b"three");
        let sent = [(); 3].map(|()| leaving.try_recv().unwrap());
        assert_eq!(sent.each_ref().map(|l| (l.carrier, l.to)), [(R, A), (R, A), (B, A)]);
        assert_eq!(sent.each_ref().map(|l| &l.packet[..]), [&b"one"[..], b"two", b"three"]);
        assert_ne!(sent[0].number, sent[1].number);
        assert_eq!([at, other].map(|at| carried.carrier(at)), [Some(R), Some(B)]);
        // Nobody's address.
        let nobody = "240.1.2.3:1".parse().unwrap();
        carried.send(nobody, b"four");
        assert!(leaving.try_recv().is_err());
        assert_eq!(carried.carrier(nobody), None);
    }

    #[test]
    fn who_waits_is_woken_by_a_packet_and_not_by_half_of_one() {
        for is_ipv6 in [false, true] {
            let (carried, _leaving) = Carried::new(is_ipv6);
            let woken = Arc::new(Woken::default());
            let waker = woken.clone().into();
            let mut context = Context::from_waker(&waker);
            assert!(carried.poll(&mut context).is_pending());
            carried.arrived(R, &from(A, Piece::First, b"a"));
            assert_eq!(woken.0.load(Ordering::Relaxed), 0);
            carried.arrived(R, &from(A, Piece::Second, b"b"));
            assert_eq!(woken.0.load(Ordering::Relaxed), 1);
            let Poll::Ready((at, packet)) = carried.poll(&mut context) else {
                panic!("it is here")
            };
            assert_eq!(packet, b"ab");
            assert_eq!(at.is_ipv6(), is_ipv6);
            // The answer goes where the packet came from.
            assert_eq!(carried.way(A, R).ip(), at.ip().to_canonical());
            assert!(is_carried(at));
        }
    }

    #[test]
    fn nothing_grows_without_bound() {
        let (carried, mut leaving) = Carried::new(false);
        let first = carried.way(A, R);
        for i in 0..WAYS_MAX as u32 {
            let mut id = [9; 32];
            id[..4].copy_from_slice(&i.to_le_bytes());
            carried.way(NodeId(id), R);
        }
        assert_eq!(carried.lock().ways.len(), WAYS_MAX);
        assert_eq!(carried.lock().ends.len(), WAYS_MAX);
        carried.send(first, b"forgotten");
        assert!(leaving.try_recv().is_err(), "the oldest made room");
        let at = carried.way(B, R);
        for _ in 0..LEAVING_MAX + 10 {
            carried.send(at, b"x");
            carried.arrived(R, &from(B, Piece::Whole, b"y"));
        }
        assert_eq!(carried.lock().arrived.len(), ARRIVED_MAX);
        assert_eq!(std::iter::from_fn(|| leaving.try_recv().ok()).count(), LEAVING_MAX);
    }

    #[test]
    fn only_the_unused_block_is_carried() {
        for (address, expected) in [
            ("240.0.0.1:1", true),
            ("255.255.255.254:9", true),
            ("[::ffff:240.0.0.1]:1", true),
            ("255.255.255.255:1", false),
            ("239.1.1.1:1", false),
            ("127.0.0.1:1", false),
            ("[fd00::1]:1", false),
        ] {
            assert_eq!(is_carried(address.parse().unwrap()), expected, "{address}");
        }
    }
}
