//! What ties a listener to a pod, without asking a container runtime: the addresses of its netns,
//! and the cgroup of its process.

use std::{
    collections::HashSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsFd,
};

use nix::{ifaddrs::getifaddrs, sys::socket::SockaddrStorage};

use crate::sys::netns;

/// The addresses on the interfaces of a netns, without loopback and link-local addresses.
///
/// # Errors
/// Where it can't be entered (`CAP_SYS_ADMIN`), or its interfaces can't be listed.
pub fn addresses(netns: impl AsFd) -> io::Result<HashSet<IpAddr>> {
    netns::inside(netns, || {
        let listed = getifaddrs()?.filter_map(|interface| ip(&interface.address?));
        Ok(listed.filter(|address| !is_local(*address)).collect())
    })?
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

fn is_local(address: IpAddr) -> bool {
    address.is_loopback()
        || match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        }
}

/// The address that this machine sends from to `address`, and so a kubelet that probes it; the
/// routing table knows it. Nothing is sent.
///
/// # Errors
/// Where there is no route.
pub fn source_towards(address: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    // The discard service's port: connecting a UDP socket only looks the route up.
    socket.connect(SocketAddr::new(address, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// The uid of the pod that a process belongs to; `None`: it is in none, or has ended.
pub fn pod_of_process(pid: u32) -> Option<String> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    cgroups.lines().find_map(pod_of_cgroup)
}

/// The uid in the path of a pod's cgroup.
fn pod_of_cgroup(line: &str) -> Option<String> {
    let path = line.splitn(3, ':').nth(2)?;
    path.split('/').find_map(pod_of_directory)
}

/// The uid in the name of a pod's cgroup: `pod<uid>` by kubelet's cgroupfs driver, `…-pod<uid with
/// _ for ->.slice` by its systemd driver (`GetPodContainerName` in
/// `pkg/kubelet/cm/pod_container_manager_linux.go`).
pub fn pod_of_directory(name: &str) -> Option<String> {
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let uid = match name.strip_prefix("pod") {
        Some(uid) => uid,
        None => name.split_once("kubepods")?.1.rsplit_once("-pod")?.1,
    };
    let uid = uid.replace('_', "-");
    let plausible = uid.len() >= 32 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    plausible.then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_read_out_of_the_paths_of_every_driver_and_runtime() {
        let uid = "0b6e1f6c-52f2-4e65-9c0a-7a3f0a8d9d01";
        let systemd = uid.replace('-', "_");
        let id = "7d3c".repeat(16);
        for line in [
            format!("0::/kubepods/burstable/pod{uid}/{id}"),
            format!("3:cpu,cpuacct:/kubepods/pod{uid}/{id}"),
            format!("0::/../../pod{uid}/{id}"),
            format!(
                "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable-pod{systemd}.slice/cri-containerd-{id}.scope"
            ),
            format!("0::/kubepods.slice/kubepods-pod{systemd}.slice/crio-{id}.scope"),
            format!(
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{systemd}.slice/docker-{id}.scope"
            ),
        ] {
            assert_eq!(pod_of_cgroup(&line).as_deref(), Some(uid), "{line}");
        }
        for line in [
            "0::/",
            "0::/system.slice/podman.service",
            "0::/user.slice/user-0.slice/pod-of-mine",
            "",
            "0::",
        ] {
            assert_eq!(pod_of_cgroup(line), None, "{line}");
        }
        // A static pod's uid is a hash.
        let hash = "44ee6ae0b1f4b5d0b0ad0a1b6c7d8e9f";
        assert_eq!(
            pod_of_cgroup(&format!("0::/kubepods/pod{hash}/x")).as_deref(),
            Some(hash)
        );
    }

    #[test]
    fn a_fresh_namespace_has_no_address_and_no_route() {
        let fresh = netns::tests::fresh();
        assert_eq!(addresses(&fresh).expect("listed"), HashSet::new());
        let far = IpAddr::from([192, 0, 2, 1]);
        netns::inside(&fresh, || source_towards(far).expect_err("no route")).expect("inside");
        let near = IpAddr::from([127, 0, 0, 1]);
        assert_eq!(source_towards(near).expect("loopback"), near);
    }

    #[test]
    fn a_process_outside_of_pods_is_in_none() {
        assert_eq!(pod_of_process(u32::MAX), None);
    }
}
