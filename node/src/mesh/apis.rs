//! Where the API of a node is, as others are told.

use std::net::{IpAddr, SocketAddr};

use protocol::NodeId;
use protocol::node_record::API_ADDRESSES_MAX;

/// A node whose API a client can ask.
pub(crate) struct Api {
    /// None where the node is in no mesh.
    pub node: Option<NodeId>,
    pub name: String,
    /// All lead to this node, the likeliest first.
    pub at: Vec<SocketAddr>,
}

impl Api {
    /// The API of a node that is in no mesh. One that listens on all addresses knows none to tell.
    pub fn alone(listen: SocketAddr) -> Api {
        Api { node: None, name: super::roster::host_name(), at: told(listen, &[]) }
    }
}

/// What a node tells of its API: the address at which that listens, or, where it listens on all of them,
/// the IP addresses of its data plane, those of other hosts first.
pub(super) fn told(listen: SocketAddr, mesh: &[SocketAddr]) -> Vec<SocketAddr> {
    if !listen.ip().is_unspecified() {
        return vec![listen];
    }
    let mut ips = Vec::new();
    for ip in mesh.iter().map(|address| address.ip().to_canonical()) {
        // A socket for IPv6 takes IPv4, too, unless the system says otherwise.
        let is_served = ip.is_ipv4() || listen.is_ipv6();
        if is_served && is_dialable(ip) && !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    ips.sort_by_key(IpAddr::is_loopback);
    ips.truncate(API_ADDRESSES_MAX);
    ips.into_iter().map(|ip| SocketAddr::new(ip, listen.port())).collect()
}

/// Those of a member's addresses that a client of this node may reach; `near` is whether both run on one
/// host, and the client, too.
pub(super) fn worth_telling(theirs: &[SocketAddr], near: bool) -> Vec<SocketAddr> {
    let worth = |at: &&SocketAddr| {
        let ip = at.ip();
        at.port() != 0 && is_dialable(ip) && (near || !ip.to_canonical().is_loopback())
    };
    theirs.iter().filter(worth).copied().collect()
}

/// Whether who asks at these addresses must be on this host.
pub(super) fn is_loopback(own: &[SocketAddr]) -> bool {
    !own.is_empty() && own.iter().all(|at| at.ip().to_canonical().is_loopback())
}

/// Whether two members share an IP address. A wrong yes (two networks behind address translation) costs a
/// client a refused connection.
pub(super) fn same_host(ours: &[SocketAddr], theirs: &[SocketAddr]) -> bool {
    ours.iter().any(|our| theirs.iter().any(|their| our.ip() == their.ip()))
}

/// Link-local addresses name an interface of their own host.
fn is_dialable(ip: IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !is_link_local && !ip.is_unspecified() && !ip.is_multicast()
}

/// Nodes that one answer lists.
pub(super) const APIS_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(text: &str) -> Vec<SocketAddr> {
        text.split_whitespace().map(|a| a.parse().unwrap()).collect()
    }

    #[test]
    fn what_is_told() {
        for (listen, mesh, expect) in [
            ("127.0.0.1:8420", "10.0.0.1:8421", "127.0.0.1:8420"),
            ("10.0.0.1:8420", "10.0.0.2:8421", "10.0.0.1:8420"),
            ("0.0.0.0:8420", "127.0.0.1:1 10.0.0.1:2 10.0.0.1:3", "10.0.0.1:8420 127.0.0.1:8420"),
            ("0.0.0.0:8420", "[2001:db8::1]:1 0.0.0.0:2", ""),
            ("[::]:8420", "[2001:db8::1]:1 10.0.0.1:2", "[2001:db8::1]:8420 10.0.0.1:8420"),
            ("[::]:8420", "[::ffff:10.0.0.1]:1 [fe80::1]:2", "10.0.0.1:8420"),
            ("0.0.0.0:8420", "", ""),
        ] {
            let told = told(listen.parse().unwrap(), &addresses(mesh));
            assert_eq!(told, addresses(expect), "{listen} {mesh}");
        }
        let many: Vec<SocketAddr> =
            (1..100).map(|n| SocketAddr::from(([10, 0, 0, n], 1))).collect();
        assert_eq!(told("0.0.0.0:1".parse().unwrap(), &many).len(), API_ADDRESSES_MAX);
    }

    #[test]
    fn what_is_passed_on() {
        let theirs = addresses(
            "10.0.0.1:8420 127.0.0.1:8420 0.0.0.0:1 10.0.0.1:0 224.0.0.1:1 [::1]:2 [::ffff:127.0.0.1]:3",
        );
        assert_eq!(worth_telling(&theirs, false), addresses("10.0.0.1:8420"));
        let near = addresses("10.0.0.1:8420 127.0.0.1:8420 [::1]:2 [::ffff:127.0.0.1]:3");
        assert_eq!(worth_telling(&theirs, true), near);
        assert!(is_loopback(&addresses("127.0.0.1:1 [::1]:2")) && !is_loopback(&[]));
        assert!(!is_loopback(&addresses("127.0.0.1:1 10.0.0.1:2")));
        let ours = addresses("10.0.0.1:1 10.0.0.2:1");
        assert!(
            same_host(&ours, &addresses("10.0.0.2:9"))
                && !same_host(&ours, &addresses("10.0.0.3:1"))
        );
    }
}
