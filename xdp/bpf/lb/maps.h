/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Every map, by family, each with the structs of its keys and values. Nowhere else are they defined: user space reads the
 * layouts, and from the typedef names the byte order, out of the object's BTF.
 *
 * Addresses are four 32-bit words in network byte order; IPv4 uses word 0 and leaves the others zero. The sizes of maps
 * are the least; user space sets the real ones before loading.
 */
#pragma once

#include "admission_maps.h"
#include "counter_maps.h"
#include "flow_maps.h"
#include "member_maps.h"
#include "nat_maps.h"
#include "pace_maps.h"
#include "prefix_maps.h"
#include "service_maps.h"
#include "stage_maps.h"
