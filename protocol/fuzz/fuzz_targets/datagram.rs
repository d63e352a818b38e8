//! Any bytes as a datagram of membership or as one that is carried: what can be decoded has one encoding
//! that gives it again, and what is cut for a carrier comes together as it was. And
//! any datagrams, from any members and at any times, to one node: no panic, every bound holds, and one
//! datagram makes the node say no more than it should.
//! For the node, a datagram is its sender, milliseconds that pass before it, two bytes of length, and
//! the bytes.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use protocol::carry::{HEADER_BYTES, Parcel, Pieces};
use protocol::membership::wire::{DATAGRAM_BYTES_MAX, Datagram};
use protocol::membership::{
    Addresses, Membership, MembershipConfig, MembershipInput, MembershipOutput,
};
use protocol::{Instant, Machine, NodeId};

type Wire = Datagram<NodeId, Addresses>;
type Node = Membership<NodeId, Addresses>;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(datagram) = Wire::decode(bytes) {
        assert_eq!(Wire::decode(&datagram.encode()), Ok(datagram));
    }
    if let Some(parcel) = Parcel::decode(bytes) {
        carry(bytes, parcel);
    }
    feed(bytes);
});

fn carry(bytes: &[u8], parcel: Parcel<'_>) {
    assert_eq!(parcel.encode(), bytes);
    let room = HEADER_BYTES + parcel.bytes.len() / 2 + 1;
    let cut = parcel.fit(room);
    assert!(cut.len() <= 2 && cut.iter().all(|datagram| datagram.len() <= room));
    let (mut pieces, mut whole) = (Pieces::default(), None);
    for datagram in cut.iter().rev() {
        let piece = Parcel::decode(datagram).expect("a parcel");
        assert_eq!((piece.way, piece.node, piece.number), (parcel.way, parcel.node, parcel.number));
        whole = pieces.take(&piece);
    }
    if cut.len() == 2 {
        assert_eq!(whole.as_deref(), Some(parcel.bytes));
    }
}

fn feed(mut bytes: &[u8]) {
    let id = |n: u8| NodeId([n; 32]);
    let contact = || Addresses::new(["192.0.2.1:1".parse().expect("an address")]).expect("few");
    let config = MembershipConfig {
        members_max: MEMBERS_MAX,
        news_max: NEWS_MAX,
        ..MembershipConfig::default()
    };
    let mut node = Node::new(config, id(0), contact(), 0, 0, 1).expect("sound");
    let mut now = Instant::ORIGIN;
    let mut out = Vec::new();
    node.preset(now, (1..9).map(|n| (id(n), contact())));
    node.handle(now, MembershipInput::Start { seeds: vec![] }, &mut out);
    while let Some((&[from, wait, a, b], rest)) = bytes.split_first_chunk::<4>() {
        let (datagram, rest) =
            rest.split_at(usize::from(u16::from_le_bytes([a, b])).min(rest.len()));
        bytes = rest;
        let until = now + Duration::from_millis(u64::from(wait));
        while let Some(at) = node.next_deadline().filter(|at| *at <= until) {
            now = at.max(now);
            node.handle(now, MembershipInput::Timer, &mut out);
        }
        now = until;
        out.clear();
        let bytes = datagram.to_vec();
        node.handle(now, MembershipInput::Datagram { from: id(from % 16), bytes }, &mut out);
        check(&node, &out);
    }
}

fn check(node: &Node, out: &[MembershipOutput<NodeId, Addresses>]) {
    let stats = node.stats();
    assert!(stats.present + stats.departed <= MEMBERS_MAX + 1, "{stats:?}");
    assert!(stats.news <= NEWS_MAX + 1, "{stats:?}");
    assert!(stats.suspects <= stats.present, "{stats:?}");
    assert!(stats.probes_in_flight <= 32 && stats.relays_in_flight <= 64, "{stats:?}");
    assert!(stats.verifications_waiting <= MEMBERS_MAX, "{stats:?}");
    let mut sends = 0;
    for output in out {
        if let MembershipOutput::Send { bytes, .. } = output {
            assert!(bytes.len() <= DATAGRAM_BYTES_MAX);
            sends += 1;
        }
    }
    // An answer for each of the updates that fit, one probe for each, and one exchange of entries.
    assert!(sends <= 2 * UPDATES_MAX + ENTRIES_MAX, "{sends} datagrams for one");
}

const MEMBERS_MAX: usize = 32;
const NEWS_MAX: usize = 16;
/// An update takes 34 bytes or more.
const UPDATES_MAX: usize = DATAGRAM_BYTES_MAX / 34;
const ENTRIES_MAX: usize = 32;
