//! Ids and addresses as the rest of the node sees them, and as libp2p does.
//!
//! A peer id of libp2p is the multihash of the encoded public key; of an Ed25519 key it is the "identity"
//! hash, so that it contains the key: each side can be had from the other
//! (<https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md>).

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId, identity};
use protocol::NodeId;
use thiserror::Error;

/// Where a node's overlay can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// A UDP address of its own.
    Direct(SocketAddr),
    /// Through a node that passes it on. Shown as `RELAY@ADDRESS`.
    Relayed { relay: NodeId, at: SocketAddr },
}

impl Address {
    /// The socket that packets go to: the node's, or its relay's.
    pub fn socket(&self) -> SocketAddr {
        match *self {
            Address::Direct(at) | Address::Relayed { at, .. } => at,
        }
    }

    /// The node that passes packets on, if one does.
    pub fn relay(&self) -> Option<NodeId> {
        match *self {
            Address::Direct(_) => None,
            Address::Relayed { relay, .. } => Some(relay),
        }
    }

    pub fn is_relayed(&self) -> bool {
        matches!(self, Address::Relayed { .. })
    }

    /// What libp2p dials to reach `node` here. `None` if the id is not a public key.
    pub(super) fn multiaddr(&self, node: NodeId) -> Option<Multiaddr> {
        let end = Protocol::P2p(peer_id(node)?);
        Some(match *self {
            Address::Direct(at) => quic(at).with(end),
            Address::Relayed { relay, at } => circuit(relay, at)?.with(end),
        })
    }

    /// Reads QUIC addresses, with or without ids in them, and circuits through one relay.
    pub(super) fn of(address: &Multiaddr) -> Option<Address> {
        let mut parts = address.iter();
        let ip = match parts.next()? {
            Protocol::Ip4(ip) => IpAddr::V4(ip),
            Protocol::Ip6(ip) => IpAddr::V6(ip),
            _ => return None,
        };
        let Protocol::Udp(port) = parts.next()? else { return None };
        let Protocol::QuicV1 = parts.next()? else { return None };
        let at = SocketAddr::new(ip, port);
        let rest: Vec<Protocol<'_>> = parts.collect();
        match rest.as_slice() {
            [] | [Protocol::P2p(_)] => Some(Address::Direct(at)),
            [Protocol::P2p(relay), Protocol::P2pCircuit]
            | [Protocol::P2p(relay), Protocol::P2pCircuit, Protocol::P2p(_)] => {
                Some(Address::Relayed { relay: node_id(relay)?, at })
            }
            _ => None,
        }
    }
}

/// Where libp2p listens for, or dials, QUIC.
pub(super) fn quic(at: SocketAddr) -> Multiaddr {
    Multiaddr::from(at.ip()).with(Protocol::Udp(at.port())).with(Protocol::QuicV1)
}

/// Where libp2p listens to be reached through `relay`.
pub(super) fn circuit(relay: NodeId, at: SocketAddr) -> Option<Multiaddr> {
    Some(quic(at).with(Protocol::P2p(peer_id(relay)?)).with(Protocol::P2pCircuit))
}

/// The peer id of a node. `None` if the bytes are not a point of the curve, thus nobody's key.
pub(super) fn peer_id(node: NodeId) -> Option<PeerId> {
    let key = identity::ed25519::PublicKey::try_from_bytes(&node.0).ok()?;
    Some(identity::PublicKey::from(key).to_peer_id())
}

/// The node behind a peer id. `None` if its key is not of Ed25519: no node of ours.
pub(super) fn node_id(peer: &PeerId) -> Option<NodeId> {
    let hash = peer.as_ref();
    if hash.code() != IDENTITY_HASH {
        return None;
    }
    let key = identity::PublicKey::try_decode_protobuf(hash.digest()).ok()?;
    Some(NodeId(key.try_into_ed25519().ok()?.to_bytes()))
}

/// Whether packets to `address` can arrive, if it was heard of from a host at `from`: loopback and
/// link-local addresses mean something only to whoever shares them, and nobody listens on port 0.
pub(super) fn makes_sense(address: &Address, from: Option<IpAddr>) -> bool {
    let at = address.socket();
    let ip = at.ip();
    let from_loopback = from.is_some_and(|ip| ip.is_loopback());
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    at.port() != 0
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !link_local
        && (!ip.is_loopback() || from_loopback)
}

/// The code of the multihash that is its own content.
const IDENTITY_HASH: u64 = 0;

/// Text that is no overlay address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("an overlay address is IP:PORT, or RELAY@IP:PORT with the id of the relay")]
pub struct BadAddress;

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Direct(at) => write!(f, "{at}"),
            Address::Relayed { relay, at } => write!(f, "{relay}@{at}"),
        }
    }
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(s: &str) -> Result<Self, BadAddress> {
        let at = |s: &str| s.parse().map_err(|_| BadAddress);
        match s.split_once('@') {
            None => Ok(Address::Direct(at(s)?)),
            Some((relay, s)) => {
                let relay = relay.parse().map_err(|_| BadAddress)?;
                Ok(Address::Relayed { relay, at: at(s)? })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys and the peer ids that they must have: the key of the libp2p specification's test vector and
    /// that of RFC 8032's first one. The ids were computed apart from this code, as the specification
    /// says: base58 of 00 24 (identity, 36 bytes) 08 01 (Ed25519) 12 20 (32 bytes) and the key.
    const VECTORS: &[(&str, &str)] = &[
        (
            "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e",
            "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq",
        ),
        (
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV",
        ),
    ];

    fn node(hex: &str) -> NodeId {
        NodeId(std::array::from_fn(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()))
    }

    #[test]
    fn ids_both_ways() {
        for (key, peer) in VECTORS {
            let (node, peer) = (node(key), peer.parse::<PeerId>().unwrap());
            assert_eq!(peer_id(node), Some(peer), "{key}");
            assert_eq!(node_id(&peer), Some(node), "{key}");
        }
    }

    #[test]
    fn ids_that_are_none() {
        // No point of the curve has this y.
        let nobody = NodeId(std::array::from_fn(|i| if i == 0 { 2 } else { 0 }));
        assert_eq!(peer_id(nobody), None);
        // An RSA key's id is a SHA-256 hash, which contains no key.
        let rsa: PeerId = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N".parse().unwrap();
        assert_eq!(node_id(&rsa), None);
    }

    #[test]
    fn addresses_both_ways() {
        let (relay, end) = (node(VECTORS[0].0), node(VECTORS[1].0));
        let at: SocketAddr = "192.0.2.7:8421".parse().unwrap();
        let at6: SocketAddr = "[2001:db8::1]:8421".parse().unwrap();
        for address in [
            Address::Direct(at),
            Address::Direct(at6),
            Address::Relayed { relay, at },
            Address::Relayed { relay, at: at6 },
        ] {
            let multiaddr = address.multiaddr(end).unwrap();
            assert_eq!(Address::of(&multiaddr), Some(address), "{multiaddr}");
            assert_eq!(address.to_string().parse(), Ok(address));
        }
        let (relay, end) = (VECTORS[0].1, VECTORS[1].1);
        let twice =
            format!("/ip4/192.0.2.7/udp/1/quic-v1/p2p/{relay}/p2p-circuit/p2p/{end}/p2p-circuit");
        for bad in [
            "/ip4/192.0.2.7/tcp/1",
            "/ip4/192.0.2.7/udp/1",
            "/ip4/192.0.2.7/udp/1/quic-v1/p2p-circuit",
            "/dns4/example.org/udp/1/quic-v1",
            twice.as_str(),
        ] {
            assert_eq!(Address::of(&bad.parse().unwrap()), None, "{bad}");
        }
        for bad in ["", "192.0.2.7", "@192.0.2.7:1", "x@192.0.2.7:1", "example.org:1"] {
            assert_eq!(bad.parse::<Address>(), Err(BadAddress), "{bad:?}");
        }
    }

    #[test]
    fn addresses_that_cannot_be_meant() {
        let far = Some("192.0.2.1".parse().unwrap());
        let near = Some("127.0.0.1".parse().unwrap());
        for (address, from, sense) in [
            ("192.0.2.7:1", None, true),
            ("10.0.0.1:1", far, true),
            ("192.0.2.7:0", far, false),
            ("0.0.0.0:1", far, false),
            ("224.0.0.251:5353", far, false),
            ("169.254.0.1:1", far, false),
            ("[fe80::1]:1", far, false),
            ("127.0.0.1:1", far, false),
            ("127.0.0.1:1", None, false),
            ("127.0.0.1:1", near, true),
            ("[::1]:1", near, true),
        ] {
            assert_eq!(makes_sense(&address.parse().unwrap(), from), sense, "{address} {from:?}");
        }
    }
}
