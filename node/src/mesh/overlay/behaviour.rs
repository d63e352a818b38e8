//! The swarm: which protocols of libp2p run, and how they are bounded.
//!
//! The order of the fields matters: who may connect is asked first, so that no protocol keeps anything of a
//! stranger.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::time::Duration;

use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    StreamProtocol, Swarm, SwarmBuilder, allow_block_list, connection_limits, dcutr, gossipsub,
    identify, identity, kad, mdns, relay, tls, yamux,
};
use libp2p_autonat::v1 as autonat;
use protocol::MeshId;

use super::limits::{
    CIRCUIT_BYTES, CIRCUIT_LIFE, IDLE_MAX, RELAY_CIRCUITS, RELAY_CIRCUITS_PER_PEER, RELAY_PLACES,
    STREAMS_PER_CONNECTION,
};
use super::observed::Observed;
use super::transport::QuicTransport;
use super::{Limits, OverlayConfig, Reachability, StartError};

type Subscriptions = gossipsub::MaxCountSubscriptionFilter<gossipsub::WhitelistSubscriptionFilter>;

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    pub allowed: allow_block_list::Behaviour<allow_block_list::AllowedPeers>,
    limits: connection_limits::Behaviour,
    pub observed: Observed,
    pub kad: kad::Behaviour<kad::store::MemoryStore>,
    mdns: Toggle<mdns::tokio::Behaviour>,
    pub gossip: gossipsub::Behaviour<gossipsub::IdentityTransform, Subscriptions>,
    autonat: autonat::Behaviour,
    pub relay: relay::Behaviour,
    relay_client: relay::client::Behaviour,
    dcutr: dcutr::Behaviour,
}

/// Builds a swarm that is subscribed to the mesh's topic and listens nowhere yet.
pub(super) fn swarm(
    config: &OverlayConfig,
    key: identity::Keypair,
    transport: QuicTransport,
) -> Result<Swarm<Behaviour>, StartError> {
    let protocol = |what: &dyn std::error::Error| StartError::Protocol(what.to_string());
    let swarm = SwarmBuilder::with_existing_identity(key)
        .with_tokio()
        .with_other_transport(|_| transport)
        .map_err(|error| protocol(&error))?
        .with_relay_client(tls::Config::new, yamux::Config::default)
        .map_err(|error| protocol(&error))?
        .with_behaviour(|key, relay_client| behaviour(config, key, relay_client))
        .map_err(|error| StartError::Protocol(error.to_string()))?
        .with_swarm_config(|swarm| {
            swarm
                .with_idle_connection_timeout(IDLE_MAX)
                // Direct addresses first, relays half a second later.
                .with_smart_dial()
                .with_max_negotiating_inbound_streams(STREAMS_PER_CONNECTION as usize)
        })
        .build();
    Ok(swarm)
}

/// The one topic of a mesh.
pub(super) fn topic(mesh: MeshId) -> gossipsub::IdentTopic {
    gossipsub::IdentTopic::new(name(mesh, "broadcast"))
}

/// What two nodes of one mesh must agree on to talk: the names of its protocols.
pub(super) fn name(mesh: MeshId, protocol: &str) -> String {
    format!("/grapevine/{mesh}/{protocol}/1")
}

fn behaviour(
    config: &OverlayConfig,
    key: &identity::Keypair,
    relay_client: relay::client::Behaviour,
) -> Result<Behaviour, Box<dyn std::error::Error + Send + Sync>> {
    let own = key.public().to_peer_id();
    let mdns = match config.mdns {
        true => Some(mdns::tokio::Behaviour::new(mdns::Config::default(), own)?),
        false => None,
    };
    Ok(Behaviour {
        allowed: allow_block_list::Behaviour::default(),
        limits: connection_limits::Behaviour::new(connections(&config.limits)),
        observed: Observed::new(identify(config.mesh, key)),
        kad: kad(config.mesh, own)?,
        mdns: mdns.into(),
        gossip: gossip(config, key)?,
        autonat: autonat::Behaviour::new(own, nat(config)),
        relay: relay::Behaviour::new(own, places()),
        relay_client,
        dcutr: dcutr::Behaviour::new(own),
    })
}

fn connections(limits: &Limits) -> connection_limits::ConnectionLimits {
    // A quarter is kept for connections that we begin ourselves: others cannot shut us in.
    let incoming = limits.connections - limits.connections / 4;
    connection_limits::ConnectionLimits::default()
        .with_max_pending_incoming(Some(limits.pending))
        .with_max_pending_outgoing(Some(limits.pending))
        .with_max_established_incoming(Some(incoming))
        .with_max_established(Some(limits.connections))
        .with_max_established_per_peer(Some(limits.connections_per_peer))
}

fn identify(mesh: MeshId, key: &identity::Keypair) -> identify::Config {
    identify::Config::new(name(mesh, "overlay"), key.public())
        .with_agent_version(concat!("grapevine/", env!("CARGO_PKG_VERSION")).to_owned())
        .with_push_listen_addr_updates(true)
        // The addresses of others are kept by `Peers`.
        .with_cache_size(0)
}

/// Finds nodes and stores nothing: records and providers are refused.
fn kad(
    mesh: MeshId,
    own: libp2p::PeerId,
) -> Result<kad::Behaviour<kad::store::MemoryStore>, libp2p::swarm::InvalidProtocol> {
    let mut config = kad::Config::new(StreamProtocol::try_from_owned(name(mesh, "kad"))?);
    config
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_kbucket_inserts(kad::BucketInserts::Manual)
        .set_periodic_bootstrap_interval(None)
        .set_replication_interval(None)
        .set_publication_interval(None)
        .set_provider_publication_interval(None)
        .set_query_timeout(Duration::from_secs(20));
    let store = kad::store::MemoryStoreConfig {
        max_records: 0,
        max_value_bytes: 0,
        max_providers_per_key: 0,
        max_provided_keys: 0,
    };
    let store = kad::store::MemoryStore::with_config(own, store);
    let mut kad = kad::Behaviour::with_config(own, store, config);
    // Nodes behind a NAT are found, too: their addresses are circuits.
    kad.set_mode(Some(kad::Mode::Server));
    Ok(kad)
}

fn gossip(
    config: &OverlayConfig,
    key: &identity::Keypair,
) -> Result<
    gossipsub::Behaviour<gossipsub::IdentityTransform, Subscriptions>,
    Box<dyn std::error::Error + Send + Sync>,
> {
    let topic = topic(config.mesh);
    let gossip = gossipsub::ConfigBuilder::default()
        .protocol_id(name(config.mesh, "gossip"), gossipsub::Version::V1_1)
        .validation_mode(gossipsub::ValidationMode::Strict)
        // Each message waits for our verdict before it is passed on.
        .validate_messages()
        .max_transmit_size(config.limits.frame_bytes)
        .duplicate_cache_time(Duration::from_secs(120))
        .connection_handler_queue_len(512)
        .build()?;
    let filter = gossipsub::MaxCountSubscriptionFilter {
        filter: gossipsub::WhitelistSubscriptionFilter(HashSet::from([topic.hash()])),
        max_subscribed_topics: 1,
        max_subscriptions_per_request: 4,
    };
    let signed = gossipsub::MessageAuthenticity::Signed(key.clone());
    let mut gossip = gossipsub::Behaviour::new_with_subscription_filter(signed, gossip, filter)?;
    gossip.subscribe(&topic)?;
    Ok(gossip)
}

/// Asks others whether they can reach us, and does the same for them.
fn nat(config: &OverlayConfig) -> autonat::Config {
    autonat::Config {
        boot_delay: Duration::from_secs(5),
        retry_interval: Duration::from_secs(15),
        refresh_interval: Duration::from_secs(300),
        throttle_server_period: Duration::from_secs(15),
        confidence_max: 2,
        timeout: Duration::from_secs(15),
        max_peer_addresses: 4,
        throttle_clients_global_max: 8,
        throttle_clients_peer_max: 1,
        throttle_clients_period: Duration::from_secs(5),
        use_connected: config.reachability == Reachability::Probe,
        ..autonat::Config::default()
    }
}

fn places() -> relay::Config {
    let often = |n| NonZeroU32::new(n).expect("not zero");
    let relay = relay::Config {
        max_reservations: RELAY_PLACES,
        // A node that was restarted may take its place again before the old one is seen to be gone.
        max_reservations_per_peer: 2,
        reservation_duration: Duration::from_secs(3600),
        reservation_rate_limiters: Vec::new(),
        max_circuits: RELAY_CIRCUITS,
        max_circuits_per_peer: RELAY_CIRCUITS_PER_PEER,
        max_circuit_duration: CIRCUIT_LIFE,
        max_circuit_bytes: CIRCUIT_BYTES,
        circuit_src_rate_limiters: Vec::new(),
    };
    relay
        .reservation_rate_per_peer(often(8), Duration::from_secs(60))
        .circuit_src_per_peer(often(60), Duration::from_secs(2))
}
