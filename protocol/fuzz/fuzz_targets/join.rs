//! Any frames, one after the other, to each side of the exchanges: no panic, and nobody is let in.
//! A frame is two bytes of kind, two of length, and the body.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use protocol::frame::{Frame, Kind};
use protocol::identity::greeting::{Greeting, GreetingInput, GreetingOutput};
use protocol::identity::join::{
    ChannelBinding, Issuer, IssuerInput, IssuerOutput, IssuerPlace, Joiner, JoinerInput,
    JoinerOutput, Purpose,
};
use protocol::identity::{Invite, NodeKey, Roles, Trust, UnixTime};
use protocol::{Instant, Machine};

const NOW: UnixTime = UnixTime(1_800_000_000);

fn frames(mut bytes: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Some((&[a, b, c, d], rest)) = bytes.split_first_chunk::<4>() {
        let length = usize::from(u16::from_le_bytes([c, d])).min(rest.len());
        let kind = Kind(u16::from_le_bytes([a % 40, b & 0x80]));
        frames.push(Frame { kind, body: rest[..length].to_vec() });
        bytes = &rest[length..];
    }
    frames
}

fuzz_target!(|bytes: &[u8]| {
    let key = |n: u8| NodeKey::from_secret([n; 32]);
    let trust = Trust::found(&key(0), key(1).id(), NOW);
    let certificate = trust.issue(&key(1), key(1).id(), Roles::ALL, 1, NOW).expect("an authority");
    let start = Instant::ORIGIN;
    let binding = ChannelBinding([7; 32]);
    let seeds = vec!["192.0.2.1:1".parse().expect("an address")];
    let grant = (Roles::ALL, 1, NOW.plus(60));
    let invite = Invite::new(&trust, &key(1), [9; 32], grant, seeds, NOW).expect("a token");

    let place = IssuerPlace {
        key: key(1),
        trust: Arc::new(trust.clone()),
        certificate: certificate.clone(),
        contacts: vec![],
        nonce: [1; 32],
        serial: 1,
    };
    let mut issuer = Issuer::new(start, place, (key(5).id(), binding));
    let purpose = Purpose::Invite(invite);
    let (mut joiner, _) = Joiner::new(start, purpose, key(5), (key(1).id(), binding), [2; 32]);
    let (mut greeting, _) = Greeting::new(start, trust, certificate, key(5).id());
    for frame in frames(bytes) {
        let mut out = Vec::new();
        issuer.handle(start, IssuerInput::Frame { frame: frame.clone(), wall: NOW }, &mut out);
        let let_in =
            |o: &IssuerOutput| matches!(o, IssuerOutput::Granted(_) | IssuerOutput::Redeem(_));
        assert!(!out.iter().any(let_in));
        let mut out = Vec::new();
        joiner.handle(start, JoinerInput::Frame { frame: frame.clone(), wall: NOW }, &mut out);
        assert!(!out.iter().any(|o| matches!(o, JoinerOutput::Joined(_))));
        let mut out = Vec::new();
        greeting.handle(start, GreetingInput::Frame { frame, wall: NOW }, &mut out);
        assert!(!out.iter().any(|o| matches!(o, GreetingOutput::Accepted(_))));
    }
});
