//! Peers that mean harm: refused, bounded, counted, and the node goes on.

use std::sync::Arc;
use std::time::Duration;

use node::mesh::{ECHO, Endpoint, MeshCounters, MeshLimits, Request};
use protocol::frame::{Frame, Kind};
use protocol::identity::NodeKey;

use super::support::{TestClock, TestNode, limits, loopback, until};

/// An endpoint that is in no mesh.
fn stranger(secret: u8) -> Endpoint {
    let counters = Arc::new(MeshCounters::default());
    let key = NodeKey::from_secret([secret; 32]);
    Endpoint::bind(&key, loopback(), Arc::new(limits()), counters).unwrap()
}

/// A mesh of two.
async fn pair(limits_of_a: MeshLimits) -> (TestNode, TestNode) {
    let clock = TestClock::new();
    let a = TestNode::start_with(None, &clock, limits_of_a).await;
    let b = TestNode::start(Some(&a.token(1)), &clock).await;
    b.connected(&a).await;
    (a, b)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_get_nothing() {
    let (a, b) = pair(limits()).await;
    let request = Request::new(ECHO, Duration::from_secs(1), vec![1]);
    let endless = [&u32::MAX.to_le_bytes()[..], &[1, 16, 0]].concat();
    let first_frames: [Vec<u8>; 6] = [
        // A call without a greeting.
        Frame::new(Kind::RPC_REQUEST, &request).encode(),
        // Garbage.
        (0..=255).cycle().take(5000).collect(),
        // A frame that claims four gigabytes.
        endless,
        // A frame of another version.
        vec![1, 0, 0, 0, 9, 16, 0, 0],
        // A greeting that is none.
        Frame { kind: Kind::PEER_HELLO, body: vec![255; 400] }.encode(),
        // A join that says nothing more, and a half frame.
        vec![40, 0, 0, 0, 1, 1, 0, 5],
    ];
    for (n, bytes) in first_frames.iter().enumerate() {
        let endpoint = stranger(n as u8 + 100);
        let link = endpoint.dial(a.mesh.address(), Some(a.id())).await.unwrap();
        let (mut send, mut receive) = link.open().await.unwrap();
        send.write_all(bytes).await.unwrap();
        // Whatever comes back is a refusal, and the connection ends.
        let mut back = Vec::new();
        let reading = async {
            while let Ok(Some(chunk)) = receive.read_chunk(1 << 16, true).await {
                back.extend_from_slice(&chunk.bytes);
            }
        };
        tokio::time::timeout(Duration::from_secs(20), reading).await.expect("the node lets go");
        assert!(back.len() < 4096, "case {n}: {} bytes", back.len());
        // A second stream is never served.
        let second = tokio::time::timeout(Duration::from_millis(200), link.open()).await;
        assert!(!matches!(second, Ok(Ok(_))), "case {n}");
    }
    until("counted", || a.count("members_refused") >= 6).await;
    assert!(a.count("faults") >= 4, "{}", a.count("faults"));
    assert!(a.reaches(&b).await && b.reaches(&a).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_sends_broken_frames_is_cut_off() {
    let (a, b) = pair(limits()).await;
    let link = b.mesh.link(a.id()).unwrap();
    let (mut send, _receive) = link.open().await.unwrap();
    send.write_all(&[255; 64]).await.unwrap();
    until("cut off", || a.count("peers_cut_off") == 1).await;
    until("gone", || a.mesh.peers().is_empty()).await;
    // For a while it is not let in; then it is, since it is a member.
    let why = b.mesh.connect(a.mesh.address(), Some(a.id())).await;
    assert!(why.is_err());
    b.connected(&a).await;
    until("served again", || !a.mesh.peers().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_streams() {
    let mut bounds = limits();
    bounds.streams_per_peer = 32;
    bounds.faults_max = 20;
    let clock = TestClock::new();
    let a = TestNode::start_with(None, &clock, bounds).await;
    let token = a.token(2);
    let hostile = TestNode::start(Some(&token), &clock).await;
    let honest = TestNode::start(Some(&token), &clock).await;
    hostile.connected(&a).await;
    honest.connected(&a).await;
    let link = hostile.mesh.link(a.id()).unwrap();
    let mut held = Vec::new();
    let opening = async {
        for _ in 0..10_000 {
            let Ok((mut send, receive)) = link.open().await else { return };
            // One byte of a frame makes the stream known to the node; the rest never comes.
            if send.write_all(&[1]).await.is_err() {
                return;
            }
            held.push((send, receive));
        }
    };
    // It never gets further than the bound and what the node gives up on in time.
    let _ = tokio::time::timeout(Duration::from_secs(3), opening).await;
    assert!(held.len() < 400, "{} streams", held.len());
    assert!(honest.reaches(&a).await, "the others are served");
    until("cut off", || a.count("peers_cut_off") == 1).await;
    assert!(a.count("faults") >= 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_loses_its_stream() {
    let (a, b) = pair(limits()).await;
    // Replies of a megabyte each that nobody reads: more than the windows hold.
    let body = vec![7; 900 << 10];
    let mut held = Vec::new();
    for _ in 0..40 {
        let request = Request::new(ECHO, Duration::from_secs(60), body.clone());
        match b.mesh.open(a.id(), &request).await {
            Ok(stream) => held.push(stream),
            Err(_) => break,
        }
    }
    until("counted", || a.count("faults") > 0).await;
    drop(held);
    // As many faults as these cut it off for a while; after that it is served again.
    for _ in 0..60 {
        if a.reaches(&b).await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    panic!("not served again within 30 s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_frames() {
    let mut bounds = limits();
    bounds.frames_per_second_max = 500;
    let (a, b) = pair(bounds).await;
    let link = b.mesh.link(a.id()).unwrap();
    let optional = Frame { kind: Kind(Kind::OPTIONAL | 1), body: vec![] }.encode();
    let (mut send, _receive) = link.open().await.unwrap();
    let flood: Vec<u8> = optional.iter().copied().cycle().take(optional.len() * 2000).collect();
    let _ = send.write_all(&flood).await;
    until("cut off", || a.count("peers_cut_off") == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn joins_are_limited_for_each_address() {
    let mut bounds = limits();
    bounds.join_burst = 3;
    bounds.join_refill = Duration::from_secs(600);
    let clock = TestClock::new();
    let a = TestNode::start_with(None, &clock, bounds).await;
    let hello = Frame::new(Kind::JOIN_HELLO, &[7u8; 32]).encode();
    for n in 0..8 {
        let link = stranger(50 + n).dial(a.mesh.address(), None).await.unwrap();
        let (mut send, _receive) = link.open().await.unwrap();
        send.write_all(&hello).await.unwrap();
        let _ = send.finish();
        until("answered", || a.count("joins_refused") + a.count("joins_limited") > u64::from(n))
            .await;
    }
    assert_eq!((a.count("joins_refused"), a.count("joins_limited")), (3, 5));
}
