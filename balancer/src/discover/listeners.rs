//! Listening TCP sockets of a netns.

use std::{
    io,
    net::{IpAddr, UdpSocket},
    os::fd::{AsFd, OwnedFd},
};

use super::processes::{SocketOwner, owners};
use crate::sys::{
    netns,
    sock_diag::{Family, Query, Socket, State, States, tcp_sockets},
    socket,
};

/// A listening socket and who has it.
#[derive(Clone, Debug)]
pub struct Listener {
    /// What the kernel says of it.
    pub socket: Socket,
    /// Every descriptor of it that we may see.
    pub owners: Vec<SocketOwner>,
}

impl Listener {
    /// Takes a descriptor of this very socket from one of its owners.
    ///
    /// # Errors
    /// `NotFound` where no owner is known or none has it any more; else what the last attempt said,
    /// as a rule `EPERM` without `CAP_SYS_PTRACE`.
    pub fn file(&self) -> io::Result<OwnedFd> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for owner in &self.owners {
            match owner.file() {
                Ok(file)
                    if socket::cookie(&file).is_ok_and(|cookie| cookie == self.socket.cookie) =>
                {
                    return Ok(file);
                }
                Ok(_) => {}
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// Lists the TCP sockets of a netns that listen on these ports (on any where none is given), IPv4
/// and IPv6, with their owners wherever these live.
///
/// # Errors
/// Where the netns can't be entered, or the socket table or `/proc` can't be read.
pub fn listeners(netns: impl AsFd, ports: &[u16]) -> io::Result<Vec<Listener>> {
    let sockets = listening_on(netns, ports)?;
    let mut owners = owners(sockets.iter().map(|socket| socket.inode))?;
    let with_owners = |socket: Socket| Listener {
        owners: owners.remove(&socket.inode).unwrap_or_default(),
        socket,
    };
    Ok(sockets.into_iter().map(with_owners).collect())
}

/// Lists the listening TCP sockets of a netns, IPv4 and IPv6. Their owners, which take a look at
/// every process, can be found for many netns at once with [`owners`].
///
/// # Errors
/// Where the netns can't be entered or the socket table can't be read.
pub fn listening(netns: impl AsFd) -> io::Result<Vec<Socket>> {
    listening_on(netns, &[])
}

fn listening_on(netns: impl AsFd, ports: &[u16]) -> io::Result<Vec<Socket>> {
    netns::inside(netns, || {
        let query = |family| Query {
            info: true,
            ports,
            ..Query::new(family, States::of(&[State::Listen]))
        };
        let mut sockets = tcp_sockets(&query(Family::V4))?;
        sockets.extend(tcp_sockets(&query(Family::V6))?);
        Ok(sockets)
    })?
}

/// Whether servers in the calling thread's netns can be bound to an address: it is one of its own,
/// or `net.ipv4.ip_nonlocal_bind` lets them (`inet_addr_valid_or_nonlocal`,
/// `include/net/inet_sock.h`). A server that sets `IP_FREEBIND` can be bound to any.
///
/// # Errors
/// Where it can't be tried.
pub fn has_address(address: IpAddr) -> io::Result<bool> {
    // By UDP, for which the kernel has the same rule and nothing listens meanwhile.
    match UdpSocket::bind((address, 0)) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::sock_diag::tests::mptcp_listener;
    use std::{
        net::{Ipv4Addr, Ipv6Addr, TcpListener},
        os::fd::AsRawFd as _,
    };

    /// Its owners but for children of other tests, which have all our descriptors until they
    /// execute their program.
    fn ours(listener: &Listener) -> Vec<SocketOwner> {
        listener
            .owners
            .iter()
            .copied()
            .filter(|owner| owner.pid == std::process::id())
            .collect()
    }

    #[test]
    fn listeners_of_a_namespace_are_found_from_outside_with_their_owners() {
        let netns = netns::tests::fresh();
        let (v4, v6) = netns::inside(&netns, || {
            let bind = |address: IpAddr| TcpListener::bind((address, 11800)).expect("bind");
            (
                bind(Ipv4Addr::UNSPECIFIED.into()),
                TcpListener::bind((Ipv6Addr::UNSPECIFIED, 11802)).expect("bind"),
            )
        })
        .expect("inside");
        let found = listeners(&netns, &[]).expect("listeners");
        assert_eq!(found.len(), 2, "{found:?}");
        for (listener, found) in [&v4, &v6].into_iter().zip(&found) {
            assert_eq!(found.socket.local, listener.local_addr().expect("address"));
            assert_eq!(
                found.socket.cookie,
                socket::cookie(listener).expect("cookie")
            );
            assert_eq!(
                ours(found),
                [SocketOwner {
                    pid: std::process::id(),
                    fd: listener.as_raw_fd()
                }]
            );
            assert_eq!(
                socket::cookie(found.file().expect("taken")).expect("cookie"),
                found.socket.cookie
            );
        }
    }

    #[test]
    fn an_address_of_another_host_is_told() {
        let has = |address: &str| has_address(address.parse().expect("an address")).expect("tried");
        assert!(has("127.0.0.1") && has("127.3.2.1"));
        assert!(!has("192.0.2.77") && !has("2001:db8::77"));
    }

    #[test]
    fn an_mptcp_listener_has_its_owner_too() {
        let netns = netns::tests::fresh();
        let listener = netns::inside(&netns, mptcp_listener).expect("inside");
        let found = listeners(&netns, &[]).expect("listeners");
        let [found] = &found[..] else {
            panic!("one listener, not {found:?}")
        };
        assert!(found.socket.mptcp);
        assert_eq!(
            ours(found),
            [SocketOwner {
                pid: std::process::id(),
                fd: listener.as_raw_fd()
            }]
        );
    }

    #[test]
    fn another_socket_under_the_same_number_is_not_taken() {
        let netns = netns::tests::fresh();
        let (_first, second) = netns::inside(&netns, || {
            [1, 2]
                .map(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("bind"))
                .into()
        })
        .expect("inside");
        let mut found = listeners(&netns, &[]).expect("listeners");
        found.retain(|listener| listener.socket.local.port() == 1);
        found[0].owners = vec![SocketOwner {
            pid: std::process::id(),
            fd: second.as_raw_fd(),
        }];
        assert_eq!(
            found[0].file().expect_err("another socket").kind(),
            io::ErrorKind::NotFound
        );
        found[0].owners.clear();
        assert_eq!(
            found[0].file().expect_err("nobody").kind(),
            io::ErrorKind::NotFound
        );
    }
}
