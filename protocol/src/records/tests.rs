use super::*;
use crate::NodeId;
use crate::wire::encode;

/// A payload is genuine if it begins with its owner's first byte.
struct FirstByte;

impl Check<NodeId> for FirstByte {
    fn is_genuine(&self, record: &Record<NodeId>) -> bool {
        record.payload.first() == Some(&record.owner.0[0])
    }
}

type Node = Records<NodeId, FirstByte>;

fn id(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn node(n: u8, members: u8) -> Node {
    let config = RecordsConfig::default();
    let mut node = Node::new(config, id(n), FirstByte, Instant::ORIGIN, n.into());
    let mut out = Vec::new();
    for member in 0..members {
        node.handle(Instant::ORIGIN, RecordsInput::Present(id(member)), &mut out);
    }
    node
}

fn payload(n: u8, text: &str) -> Vec<u8> {
    [&[n], text.as_bytes()].concat()
}

/// Runs the nodes for that long; every `lost`-th message gets lost.
fn run(nodes: &mut [Node], from_ms: u64, to_ms: u64, lost: u64) {
    let mut sent = 0;
    for ms in (from_ms..to_ms).step_by(20) {
        let now = Instant::from_millis(ms);
        let mut wire = Vec::new();
        for (n, node) in nodes.iter_mut().enumerate() {
            let mut out = Vec::new();
            if node.next_deadline().is_some_and(|at| at <= now) {
                node.handle(now, RecordsInput::Timer, &mut out);
            }
            wire.extend(out.into_iter().map(|output| (n, output)));
        }
        while let Some((from, output)) = wire.pop() {
            let RecordsOutput::Send { to, bytes } = output else { continue };
            assert!(bytes.len() <= MESSAGE_BYTES_MAX);
            sent += 1;
            if sent % lost == 0 {
                continue;
            }
            let to = usize::from(to.0[0]);
            let (mut out, from) = (Vec::new(), id(from as u8));
            nodes[to].handle(now, RecordsInput::Message { from, bytes }, &mut out);
            wire.extend(out.into_iter().map(|output| (to, output)));
        }
    }
}

#[test]
fn records_reach_everyone_and_the_newest_wins() {
    let mut nodes: Vec<_> = (0..40).map(|n| node(n, 40)).collect();
    for (round, begin_ms) in [("first", 0), ("second", 3000)] {
        for n in 0..40 {
            let publish = RecordsInput::Publish { incarnation: 3, payload: payload(n, round) };
            nodes[usize::from(n)].handle(Instant::ORIGIN, publish, &mut Vec::new());
        }
        run(&mut nodes, begin_ms, begin_ms + 3000, 3);
    }
    run(&mut nodes, 6000, 40_000, 3);
    for node in &nodes {
        for n in 0..40 {
            let record = node.record(&id(n)).expect("it has spread");
            assert_eq!((record.incarnation, record.version), (3, 1));
            assert_eq!(record.payload, payload(n, "second"));
        }
        assert_eq!(node.stats().fresh, 0);
    }
    // At rest only comparisons are left.
    let before: u64 = nodes.iter().map(|n| n.stats().bytes_out).sum();
    run(&mut nodes, 40_000, 50_000, u64::MAX);
    let after: u64 = nodes.iter().map(|n| n.stats().bytes_out).sum();
    assert!((after - before) / 40 / 10 < 1000, "{} bytes/s", (after - before) / 40 / 10);
}

#[test]
fn the_record_of_the_gone_is_dropped() {
    let mut node = node(0, 5);
    let record = Record { owner: id(3), incarnation: 0, version: 0, payload: payload(3, "x") };
    let bytes = encode(&Message::Records(vec![record]));
    let message = RecordsInput::Message { from: id(1), bytes };
    let mut out = Vec::new();
    node.handle(Instant::ORIGIN, message.clone(), &mut out);
    node.handle(Instant::ORIGIN, RecordsInput::Departed(id(3)), &mut out);
    assert_eq!(out, [RecordsOutput::Changed(id(3)), RecordsOutput::Dropped(id(3))]);
    // And does not come back from those who have not heard of it.
    node.handle(Instant::ORIGIN, message, &mut out);
    assert_eq!((node.record(&id(3)), node.stats().strangers), (None, 1));
}

#[test]
fn forged_old_and_unreadable_records_are_refused() {
    let mut node = node(0, 5);
    let record = |owner, version, first| Record {
        owner: id(owner),
        incarnation: 1,
        version,
        payload: payload(first, "x"),
    };
    let long = Record { payload: vec![3; PAYLOAD_BYTES_MAX + 1], ..record(3, 9, 3) };
    let mut hear = |message: &[u8]| {
        let input = RecordsInput::Message { from: id(1), bytes: message.to_vec() };
        node.handle(Instant::ORIGIN, input, &mut Vec::new());
        let RecordsStats { accepted, stale, forged, strangers, malformed, .. } = node.stats();
        [accepted, stale, forged, strangers, malformed]
    };
    for (record, expect) in [
        (record(3, 1, 3), [1, 0, 0, 0, 0]),
        (record(3, 1, 3), [1, 1, 0, 0, 0]),
        (record(3, 0, 3), [1, 2, 0, 0, 0]),
        (record(3, 2, 4), [1, 2, 1, 0, 0]),
        (long, [1, 2, 2, 0, 0]),
        (record(9, 0, 9), [1, 2, 2, 1, 0]),
        (record(0, 9, 0), [1, 3, 2, 1, 0]),
    ] {
        assert_eq!(hear(&encode(&Message::Records(vec![record]))), expect);
    }
    let unsorted = vec![(id(3), 0, 0), (id(2), 0, 0)];
    let unsorted = Message::Digest { after: None, to_end: true, versions: unsorted };
    let bad = [vec![], vec![9], vec![0; MESSAGE_BYTES_MAX + 1], encode(&unsorted)];
    for (count, bytes) in (1..).zip(bad) {
        assert_eq!(hear(&bytes)[4], count);
    }
}

#[test]
fn the_budget_bounds_what_is_sent() {
    let mut node = node(0, 200);
    for n in 1..200 {
        let payload = vec![n; PAYLOAD_BYTES_MAX];
        let record = Record { owner: id(n), incarnation: 0, version: 0, payload };
        let bytes = encode(&Message::Records(vec![record]));
        let message = RecordsInput::Message { from: id(1), bytes };
        node.handle(Instant::ORIGIN, message, &mut Vec::new());
    }
    for ms in (0..2000).step_by(10) {
        let now = Instant::from_millis(ms);
        node.handle(now, RecordsInput::Timer, &mut Vec::new());
        let bytes =
            encode(&Message::Digest::<NodeId> { after: None, to_end: true, versions: vec![] });
        node.handle(now, RecordsInput::Message { from: id(1), bytes }, &mut Vec::new());
    }
    let stats = node.stats();
    assert!(stats.bytes_out <= 3 * node.config.bytes_per_s_max, "{stats:?}");
    assert!(stats.deferred > 10 && stats.bytes_out > node.config.bytes_per_s_max, "{stats:?}");
}

#[test]
fn golden() {
    let hex = |message: &Message<NodeId>| {
        encode(message).iter().map(|b| format!("{b:02x}")).collect::<String>()
    };
    let (one, two) = ("01".repeat(32), "02".repeat(32));
    let record = Record { owner: id(1), incarnation: 3, version: 4, payload: vec![9, 8] };
    assert_eq!(hex(&Message::Records(vec![record])), format!("0001{one}0304020908"));
    let versions = vec![(id(1), 3, 4), (id(2), 5, 6)];
    let digest = Message::Digest { after: Some(id(1)), to_end: true, versions };
    assert_eq!(hex(&digest), format!("0101{one}0102{one}0304{two}0506"));
    let empty = Message::Digest::<NodeId> { after: None, to_end: false, versions: vec![] };
    assert_eq!(hex(&empty), "01000000");
    assert_eq!(hex(&Message::Want(vec![id(2)])), format!("0201{two}"));
}
