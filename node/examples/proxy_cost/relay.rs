//! The yardstick: a process that does nothing but copy the bytes of a TCP connection to another one and
//! back. What that costs is the price of passing through any process here.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;

/// Relays connections to `target` until the standard input ends. Prints its address.
pub fn run_relay(target: &str) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{} -", listener.local_addr()?);
    let target = target.to_owned();
    thread::spawn(move || {
        for client in listener.incoming() {
            // The client sees a connection that ends, and fails.
            if let Err(error) = client.and_then(|client| relay(client, &target)) {
                eprintln!("relay: {error}");
            }
        }
    });
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn relay(client: TcpStream, target: &str) -> std::io::Result<()> {
    let server = TcpStream::connect(target)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_server) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || copy(from_client, to_server));
    thread::spawn(move || copy(server, client));
    Ok(())
}

/// Until one side ends, which the other one sees.
fn copy(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 16 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
