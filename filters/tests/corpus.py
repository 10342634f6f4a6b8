"""Expressions over every primitive of pcap-filter(7) that Ethernet has."""

from __future__ import annotations

EXPRESSIONS = """
host 10.1.2.3
src host 10.1.2.3
dst host 192.168.7.9
src or dst host 10.1.2.3
src and dst host 10.1.2.3
ip host 10.1.2.3
arp host 10.1.2.3
rarp host 10.1.2.3
host 2001:db8::3
src host 2001:db8:9::9
ip6 host 2001:db8::3
ether host 02:00:00:00:00:01
ether src 02:00:00:00:00:02
ether dst ff:ff:ff:ff:ff:ff
ether host 02:00:00:00:00:01 and not host 10.1.2.3
net 10.0.0.0/8
src net 192.168
dst net 10.1.2.0 mask 255.255.255.0
net 10.1.2.0/31
net 0.0.0.0/0
ip6 net 2001:db8::/32
src net 2001:db8::/31
dst net 2001:db8::/127
port 53
src port 80
dst port 80
tcp port 80
udp port 53
sctp port 53
tcp dst port 443
portrange 50-90
src portrange 40000-40001
tcp portrange 79-81
udp dst portrange 5000-6000
less 60
greater 100
len <= 64
len > 100 and len != 200
ip
ip6
arp
rarp
atalk
aarp
iso
stp
ipx
netbeui
tcp
udp
sctp
icmp
icmp6
igmp
vrrp
carp
pim
ah
esp
ip proto 47
ip proto \\udp
ip6 proto 44
ip6 proto \\tcp
proto 17
ether proto 0x88cc
ether proto \\arp
ip protochain 6
ip6 protochain 6
ip6 protochain 17
protochain 58
ether broadcast
ether multicast
broadcast
multicast
ip multicast
ip6 multicast
vlan
vlan 100
vlan 100 and ip
vlan 100 and udp port 53
vlan 100 and vlan 200 and tcp port 80
vlan and vlan and not ip6
not vlan and ip
mpls
mpls 100000
mpls 100000 and udp port 53
mpls 5 and mpls 1024 and tcp port 80
pppoed
pppoes
pppoes 0x27
pppoes 0x27 and ip host 10.1.2.3
pppoes and ip6 and tcp port 80
vlan 100 or (vlan 200 and ip)
geneve
geneve 5
geneve 5 and tcp port 80
geneve and ip host 10.1.2.3
llc
llc i
llc s
llc u
llc ui
llc rr
clnp
esis
isis
is-is
lsp
csnp
ether[0] & 1 = 0 and ip[16] >= 224
ip[0] & 0xf != 5
ip[6:2] & 0x1fff = 0
ip[2:2] > 576
ip[8] < 5
ip6[6] = 17
ip6[40] = 0x9c
tcp[13] & 2 != 0
tcp[tcpflags] & (tcp-syn|tcp-ack) == tcp-syn
tcp[tcpflags] & (tcp-fin|tcp-rst) != 0
tcp[0:2] = 80 or tcp[2:2] = 80
udp[4:2] > 20
udp[8:4] = 0x30313233
icmp[icmptype] = icmp-echo
icmp[icmptype] != icmp-echo and icmp[icmptype] != icmp-echoreply
icmp[icmpcode] = 3
icmp6[icmp6type] = icmp6-echo
icmp[8:2] * 2 + 3 = 10
arp[6:2] = 1
sctp[0:2] = 40000
ether[12:2] = 0x0800 and ether[14] & 0xf0 = 0x40
ether[100:4] != 0
tcp port 80 and (((ip[2:2] - ((ip[0]&0xf)<<2)) - ((tcp[12]&0xf0)>>2)) != 0)
tcp[((tcp[12] & 0xf0) >> 2):4] = 0x30313233
ip[ip[0] & 0xf] = 0
ether[ether[0]:2] = 0
udp[udp[4:2]] = 5
ip[2:2] / 4 % 7 = 3
ip[2:2] / ip[8] > 1
ip[2:2] << ip[8] > 5
ip[2:2] >> 3 = 10
ip[2:2] ^ 0xff = 0xaa
ip[4:2] | ip[2:2] > 100
-ip[0] = 5
10 > ip[0] & 0xf
0x7fffffff < ip[12:4]
ether[70000] = 0
not tcp and not udp
ip and not (net 10.0.0.0/8 or tcp port 22)
tcp or udp or icmp
host 10.1.2.3 and (port 53 or port 80) and not icmp
(tcp[13] & 7 = 2 and net 10.0.0.0/8) or (ip6 and udp dst port 53) or arp or vlan 100
tcp and (src port 1 or src port 2 or src port 3 or dst port 80)
ifindex 1
""".strip().splitlines()

# What no dead handle of libpcap compiles for Ethernet, with the rest of the language.
REFUSED = """
udp port
host
foo bar
tcp port 70000
vlan 5000
ether[0:3] = 1
net 10.1.2.3/8
ip broadcast
portrange 5-
ip host 2001:db8::1
1 / 0 = 1
wlan type mgt
dir 5
tcp[0
mpls 2000000
pppoes 70000
gateway 10.1.2.3
port http80
""".strip().splitlines()
